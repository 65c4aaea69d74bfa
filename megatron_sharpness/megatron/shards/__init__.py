"""How the parameters of Megatron's optimizers lie on the ranks, one file a way of sharding.

Each gives the pairs of what its optimizer steps and where the forward pass reads it. Where ranks
step parts of a parameter, it also has the gathers that bring them together.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from torch import Tensor

from megatron_sharpness.core.update_line import Shard
from megatron_sharpness.megatron.shards import parameter_buffers, replicated


def leaf_optimizers(optimizer: Any) -> list[tuple[Any, Any]]:
    """The optimizers that own parameters, those of a chain or the one that there is, each with the
    group of ranks over which Megatron sums its gradient norm."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is None:
        return [(optimizer, optimizer.get_grad_stats_parallel_group())]
    leaves = [pair for member in chained for pair in leaf_optimizers(member)]
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        # Whole parameters are dealt out to the data-parallel ranks: all ranks together have all.
        return [(leaf, None) for leaf, _ in leaves]
    return leaves


def shards_of(optimizer: Any) -> list[Shard]:
    """This rank's shards of one leaf optimizer: main parameter and where the forward reads it."""
    if optimizer.is_stub_optimizer:  # this rank has nothing to train
        return []
    way = parameter_buffers if parameter_buffers.owns(optimizer) else replicated
    return [
        Shard(main=main, model=model, counted=_is_counted(main, optimizer))
        for main, model in way.pairs(optimizer)
    ]


def trained_tensors(model: Sequence[Any], optimizer: Any) -> list[Tensor]:
    """What training would change of a model, as far as this rank has it: the parameters that its
    optimizers own, main and in the model, and the buffers."""
    shards = [shard for leaf, _ in leaf_optimizers(optimizer) for shard in shards_of(leaf)]
    buffers = [buffer for chunk in model for buffer in chunk.module.buffers()]
    return [*(tensor for shard in shards for tensor in (shard.main, shard.model)), *buffers]


_DUPLICATE_GROUPS = tuple(
    name
    for name in ("tp_group", "expert_tp_group")
    if name in inspect.signature(tensor_parallel.param_is_not_tensor_parallel_duplicate).parameters
)


def _is_counted(main: Tensor, optimizer: Any) -> bool:
    """Whether Megatron counts this copy in the gradient norm: not shared, no tensor-parallel
    duplicate."""
    groups = {name: getattr(optimizer, name, None) for name in _DUPLICATE_GROUPS}
    return not getattr(main, "shared", False) and bool(
        tensor_parallel.param_is_not_tensor_parallel_duplicate(main, **groups)
    )
