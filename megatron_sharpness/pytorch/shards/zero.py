"""ZeroRedundancyOptimizer: whole parameters are dealt out to the ranks, which step each its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from megatron_sharpness.pytorch.shards.tensors import Tensors, trained


class ZeroShards(Tensors):
    """Those that ``optimizer.optim`` steps on this rank."""

    def __init__(self, optimizer: ZeroRedundancyOptimizer, first_rank: int) -> None:
        super().__init__(optimizer, first_rank)
        self._group = optimizer.process_group
        self._broadcasts: list[tuple[Tensor, int]] | None = None

    def parameters(self) -> list[Tensor]:
        return trained(self.optimizer.optim)

    def state_of(self, parameter: Tensor) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.optimizer.optim.state.get(parameter, {})
        return found

    def is_counted(self, parameter: Tensor) -> bool:
        return self.first_rank in dist.get_process_group_ranks(self._group)

    def sync(self) -> None:
        if self._broadcasts is None:
            self._broadcasts = self._owners()
        for parameter, owner in self._broadcasts:
            dist.broadcast(parameter, group=self._group, group_src=owner)

    def _owners(self) -> list[tuple[Tensor, int]]:
        """Each parameter, and the rank in the group that steps it. Collective."""
        mine = {id(parameter) for parameter in self.parameters()}
        everything = [p for group in self.optimizer.param_groups for p in group["params"]]
        indices: list[Any] = [None] * dist.get_world_size(self._group)
        held = [i for i, parameter in enumerate(everything) if id(parameter) in mine]
        dist.all_gather_object(indices, held, group=self._group)
        return [(everything[i].detach(), rank) for rank, owned in enumerate(indices) for i in owned]
