"""Whole parameters dealt out to the data-parallel ranks, gathered by the optimizer itself: Muon's
older layout (``--optimizer dist_muon``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

from megatron_sharpness.megatron.shards.gathers import Gathers


def gathers(model: Sequence[Any], optimizer: Any) -> list[Gathers]:
    """Those that such an optimizer makes after its step, where DDP does not."""
    members = [optimizer, *getattr(optimizer, "chained_optimizers", [])]
    return [
        _GathersAfterStep(member)
        for member in members
        if isinstance(member, LayerWiseDistributedOptimizer)
        and not getattr(member, "async_allgather", False)
        and not getattr(member, "use_buffer_param_sync", False)
        and getattr(member, "dp_cp_params_list", None)
    ]


class _GathersAfterStep(Gathers):
    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def sync(self) -> None:
        self._optimizer.allgather_params()
