"""How the parameters that an optimizer steps lie on the ranks, one file a way of sharding.

All are asked the same: which shards this rank steps (:meth:`~tensors.Tensors.shards`), with which
gradients (:meth:`~tensors.Tensors.gradients`), and to have the next forward pass see what was
written to them (``sync``).
"""

from __future__ import annotations

from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from megatron_sharpness.pytorch.shards.dtensor import local
from megatron_sharpness.pytorch.shards.fsdp2 import FullyShardedModules
from megatron_sharpness.pytorch.shards.tensors import Tensors
from megatron_sharpness.pytorch.shards.zero import ZeroShards

__all__ = ["FullyShardedModules", "Tensors", "local", "shards_of"]


def shards_of(optimizer: Optimizer) -> Tensors:
    """Those of an optimizer, whichever way they are sharded."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        return ZeroShards(optimizer)
    return Tensors(optimizer)
