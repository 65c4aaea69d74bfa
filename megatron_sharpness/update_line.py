"""The line θ(η) = θ_t + (η/lr)(θ_{t+1} − θ_t) on the parameters that this rank owns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A piece of a parameter that this rank's optimizer updates.

    Attributes:
        main: what the optimizer steps, in the precision that it steps in (fp32 as a rule).
        model: where the forward pass reads the same elements, in the model's precision. It may be
            ``main`` itself, or share its memory.
        counted: whether this rank's copy counts in sums over all ranks; False for the second and
            later copies of a parameter that several ranks hold.
    """

    main: Tensor
    model: Tensor
    counted: bool = True

    @property
    def aliased(self) -> bool:
        """Whether the forward pass reads the very memory that the optimizer steps."""
        return self.main.untyped_storage().data_ptr() == self.model.untyped_storage().data_ptr()


class UpdateLine:
    """Snapshot, move and restore the shards of one optimizer step.

    Call :meth:`begin` before the step and :meth:`end` after it. In between the memory of one copy
    of the shards' main parameters is taken; :meth:`end` takes a second one for the shards whose
    main parameter is the model's own. With ``offload`` the copies lie on the host, in pinned
    memory where there is a GPU.
    """

    def __init__(self, shards: Sequence[Shard], *, offload: bool = False) -> None:
        self.shards = shards
        self.offload = offload
        self._starts: list[Tensor] = []
        self._ends: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where the model's shards lie."""
        return self.shards[0].model.device if self.shards else torch.device("cpu")

    @torch.no_grad()
    def begin(self) -> None:
        """Keep θ_t."""
        self._starts = [self._copy(shard.main) for shard in self.shards]

    @torch.no_grad()
    def end(self) -> None:
        """Take θ_{t+1}: the main parameters themselves, or a copy where probes overwrite them."""
        self._ends = [
            self._copy(shard.main) if shard.aliased else shard.main.detach()
            for shard in self.shards
        ]

    @torch.no_grad()
    def move(self, fraction: float) -> None:
        """Write θ_t + fraction·(θ_{t+1} − θ_t) into the model; 0 and 1 are exact copies.

        The sum is taken in the main parameters' precision and rounded once. Adding to bf16 weights
        in place would lose the small updates.
        """
        for shard, start, end in zip(self.shards, self._starts, self._ends, strict=True):
            if fraction == 0.0:
                point = start
            elif fraction == 1.0:
                point = end
            else:
                device = shard.model.device
                point = torch.lerp(
                    start.to(device, non_blocking=True), end.to(device, non_blocking=True), fraction
                )
            shard.model.copy_(point.view_as(shard.model), non_blocking=True)

    @torch.no_grad()
    def products(self, gradients: Iterable[Tensor | None], total: Tensor) -> None:
        """Add ⟨g, θ_t − θ_{t+1}⟩, ‖θ_t − θ_{t+1}‖² and ‖g‖² of the shards that count to ``total``.

        Args:
            gradients: for each shard the gradient that the step used, of the elements of
                ``Shard.main``, or None where there is none.
            total: fp64, shape [3].
        """
        for shard, start, end, grad in zip(
            self.shards, self._starts, self._ends, gradients, strict=True
        ):
            if not shard.counted:
                continue
            device = shard.model.device
            precision = torch.promote_types(start.dtype, torch.float32)
            update = start.to(device, precision) - end.to(device, precision)
            total[1] += torch.sum(update * update, dtype=torch.float64).to(total.device)
            if grad is not None:
                grad = grad.to(device, precision).view_as(update)
                total[0] += torch.sum(grad * update, dtype=torch.float64).to(total.device)
                total[2] += torch.sum(grad * grad, dtype=torch.float64).to(total.device)

    def _copy(self, tensor: Tensor) -> Tensor:
        if not self.offload:
            return tensor.detach().clone()
        host = torch.empty(
            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda"
        )
        return host.copy_(tensor.detach())
