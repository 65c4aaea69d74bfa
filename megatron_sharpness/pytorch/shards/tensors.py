"""Optimizers that step tensors as the model reads them: whole ones, or DTensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from megatron_sharpness.core.update_line import Shard
from megatron_sharpness.pytorch.shards.dtensor import (
    Place,
    holds_first_copy,
    local,
    local_gradient,
    place_of,
)


class Tensors:
    """The parameters that an optimizer steps on this rank, and how they get to the others.

    They come from the optimizer: a model's own are the gathered ones after an FSDP2 forward pass,
    and what is written to those is lost.

    Args:
        optimizer: PyTorch's, or one like it.
        first_rank: the lowest of the ranks that hold the same part of the model.
    """

    def __init__(self, optimizer: Any, first_rank: int) -> None:
        self.optimizer = optimizer
        self.first_rank = first_rank

    def parameters(self) -> list[Tensor]:
        """Those that train, in the optimizer's order."""
        return trained(self.optimizer)

    def of_model(self) -> list[Tensor]:
        """Those of the model that it steps, on whichever rank."""
        return [parameter for group in self.groups() for parameter in group["params"]]

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups that hold any."""
        return [group for group in self.optimizer.param_groups if group["params"]]

    def state_of(self, parameter: Tensor) -> Mapping[str, Any]:
        """What the optimizer keeps of one of :meth:`parameters`."""
        found: Mapping[str, Any] = self.optimizer.state.get(parameter, {})
        return found

    def place_of(self, parameter: Tensor) -> Place:
        """Where in the model's tensor the elements of one of :meth:`parameters` lie."""
        return place_of(parameter)

    def inside(self) -> list[Optimizer]:
        """The optimizers whose steps this one's consists of, if the gradients are there in those
        alone."""
        return []

    @property
    def steps_on_gradients(self) -> bool:
        """Whether what is in the gradients' place are the gradients of the loss."""
        return True

    def gradients_in(self, inner: Optimizer) -> dict[int, Tensor | None]:
        """By the number of the shard, the gradients that one of those steps on."""
        return {}

    def shards(self) -> list[Shard]:
        """What this rank holds of them. Read anew at each call: a step may put another tensor in a
        parameter's place."""
        return [self._shard(parameter) for parameter in self.parameters()]

    def check(self) -> None:
        """Called before a step.

        Raises:
            ProbeError: the forward passes have read other weights than those that it moves.
        """

    def gradients(self) -> list[Tensor | None]:
        """The gradients of what :meth:`shards` gives. Collective where they are partial sums."""
        return [local_gradient(parameter) for parameter in self.parameters()]

    def is_counted(self, parameter: Tensor) -> bool:
        """Whether, of the equal copies that several ranks hold, this rank's is the one to count."""
        return holds_first_copy(parameter, self.first_rank)

    def settle(self) -> None:
        """Wait for what a forward pass has left under way, before anything is written."""

    def sync(self) -> None:
        """Bring what was written here to the ranks that do not step it. Collective."""

    def _shard(self, parameter: Tensor) -> Shard:
        held = local(parameter)
        return Shard(main=held, model=held, counted=self.is_counted(parameter))


def trained(optimizer: Any) -> list[Tensor]:
    """The parameters of its groups that train."""
    return [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
