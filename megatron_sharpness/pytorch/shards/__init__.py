"""How the parameters that an optimizer steps lie on the ranks, one file a way of sharding.

All are asked the same: which shards this rank steps (:meth:`~tensors.Tensors.shards`), with which
gradients (:meth:`~tensors.Tensors.gradients`), whether its forward passes have read them
(``check``), and, around what is written to them, to wait for what still reads them (``settle``) and
to have the next forward pass see it (``sync``).
"""

from __future__ import annotations

from typing import Any

from torch.distributed.optim import ZeroRedundancyOptimizer

from megatron_sharpness.core.fully_sharded import FullyShardedModules
from megatron_sharpness.pytorch.shards import deepspeed, megatron_fsdp
from megatron_sharpness.pytorch.shards.dtensor import local
from megatron_sharpness.pytorch.shards.megatron_fsdp import MegatronFSDPShards
from megatron_sharpness.pytorch.shards.tensors import Tensors, trained
from megatron_sharpness.pytorch.shards.zero import ZeroShards

__all__ = ["OF_PASSES", "FullyShardedModules", "Tensors", "local", "shards_of"]

#: Attributes in which sharding keeps what a pass has gathered, and from where.
OF_PASSES = (*megatron_fsdp.GATHERED, *deepspeed.NOTED)


def shards_of(optimizer: Any, first_rank: int = 0) -> Tensors:
    """Those of an optimizer, whichever way they are sharded.

    Args:
        optimizer: PyTorch's, one like it, or a DeepSpeed engine's.
        first_rank: the lowest of the ranks that hold the same part of the model.
    """
    if deepspeed.owns(optimizer):
        return deepspeed.shards_of(optimizer, first_rank)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        return ZeroShards(optimizer, first_rank)
    if any(map(megatron_fsdp.owns, trained(optimizer))):
        return MegatronFSDPShards(optimizer, first_rank)
    return Tensors(optimizer, first_rank)
