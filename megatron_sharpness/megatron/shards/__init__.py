"""How the parameters of Megatron's optimizers lie on the ranks, one file a way of sharding.

Each knows its optimizers (``owns``), what they step and where the forward pass reads it
(``stepped``), and, where ranks step parts of a model, how those come together (``gathers``).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from torch import Tensor

from megatron_sharpness.core.update_line import Shard
from megatron_sharpness.megatron.shards import (
    layer_wise,
    megatron_fsdp,
    megatron_fsdp_v2,
    parameter_buffers,
    precision_aware,
    replicated,
    torch_fsdp2,
)
from megatron_sharpness.megatron.shards.gathers import AllGathers, Gathers, Stepped

_WAYS: tuple[Any, ...] = (
    megatron_fsdp_v2, megatron_fsdp, precision_aware, parameter_buffers, torch_fsdp2, replicated
)  # fmt: skip


class Leaf:
    """An optimizer that owns parameters: one of a chain, or the one that there is.

    Args:
        optimizer: Megatron's.
        groups: of ranks over which sums over its parameters are taken, one after the other.
    """

    def __init__(self, optimizer: Any, groups: Sequence[Any]) -> None:
        self.optimizer = optimizer
        self._groups = groups
        self._way = next(way for way in _WAYS if way.owns(optimizer))

    def shards(self) -> list[Shard]:
        """This rank's shards: main parameter and where the forward reads it."""
        return [
            Shard(
                main=each.main,
                model=each.model,
                counted=self.counts(each.parameter),
                packed=each.packed,
            )
            for each in self.stepped()
        ]

    def gradients(self, clip: float) -> Iterator[Tensor | None]:
        """What the step has used of each shard, in their order.

        Args:
            clip: what Megatron has multiplied the gradients by.
        """
        for each in self.stepped():
            if each.gradient is None or each.clipped:
                yield each.gradient
            else:
                yield each.gradient.to(each.main.dtype, copy=True).mul_(clip)

    def sum_up(self, partial: Tensor) -> Tensor:
        """This rank's sums over its shards, added up over all ranks in place. Collective."""
        parts = torch_fsdp2.sharded_over(self.optimizer) if self._way is torch_fsdp2 else ()
        for group in (*parts, *self._groups):
            dist.all_reduce(partial, group=group)
        return partial

    def stepped(self) -> list[Stepped]:
        """What it steps on this rank."""
        if self.optimizer.is_stub_optimizer:  # this rank has nothing to train
            return []
        return list(self._way.stepped(self.optimizer))

    def counts(self, parameter: Tensor) -> bool:
        """Whether Megatron counts this copy in the gradient norm: not shared, no tensor-parallel
        duplicate."""
        groups = {name: getattr(self.optimizer, name, None) for name in _DUPLICATE_GROUPS}
        return not getattr(parameter, "shared", False) and bool(
            tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter, **groups)
        )


_DUPLICATE_GROUPS = tuple(
    name
    for name in ("tp_group", "expert_tp_group")
    if name in inspect.signature(tensor_parallel.param_is_not_tensor_parallel_duplicate).parameters
)


def leaves_of(optimizer: Any) -> list[Leaf]:
    """The optimizers that own parameters, those of a chain or the one that there is."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is None:
        return [Leaf(optimizer, [optimizer.get_grad_stats_parallel_group()])]
    leaves = [leaf for member in chained for leaf in leaves_of(member)]
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        # Whole parameters are dealt out to the data-parallel ranks: all ranks together have all.
        return [Leaf(leaf.optimizer, [None]) for leaf in leaves]
    return leaves


def gathers_of(model: Sequence[Any], optimizer: Any) -> Gathers:
    """How what the ranks step comes together in the model chunks of this rank."""
    found: list[Gathers] = []
    for way in (parameter_buffers, layer_wise, megatron_fsdp, megatron_fsdp_v2, torch_fsdp2):
        found += way.gathers(model, optimizer)
    return AllGathers(found)


def trained_tensors(model: Sequence[Any], optimizer: Any) -> list[Tensor]:
    """What training would change of a model, as far as this rank has it: the parameters that its
    optimizers own, main and in the model, and the buffers."""
    shards = [shard for leaf in leaves_of(optimizer) for shard in leaf.shards()]
    buffers = [buffer for chunk in model for buffer in chunk.module.buffers()]
    return [*(tensor for shard in shards for tensor in (shard.main, shard.model)), *buffers]
