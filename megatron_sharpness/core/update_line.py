"""The line θ(η) = θ_t + (η/lr)(θ_{t+1} − θ_t) on the parameters that this rank owns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_sharpness.core.products import product_sums

#: Elements taken at a time. What is computed from them, 4 MiB in fp32, stays in the cache until it
#: is cast or summed: memory is read once and written once, and nothing as large as a shard is made.
CHUNK = 2**20


class Packed(Protocol):
    """Main parameters that an optimizer keeps in a form of its own, beside the model's."""

    def unpack(self) -> Tensor:
        """Their values, as a new tensor."""
        ...

    def pack(self, values: Tensor) -> None:
        """Keep these values. What lies in the model is not written."""
        ...


@dataclass(frozen=True)
class Shard:
    """A piece of a parameter that this rank's optimizer updates.

    Attributes:
        main: what the optimizer steps, in the precision that it steps in (fp32 as a rule).
        model: where the forward pass reads the same elements, in the model's precision. It may be
            ``main`` itself, or share its memory.
        counted: whether this rank's copy counts in sums over all ranks; False for the second and
            later copies of a parameter that several ranks hold.
        packed: what has the main parameters where ``main`` is but the optimizer's name for them.
            ``model`` need not be their values rounded to nearest even.
    """

    main: Tensor
    model: Tensor
    counted: bool = True
    packed: Packed | None = None

    @property
    def aliased(self) -> bool:
        """Whether the forward pass reads the very memory that the optimizer steps."""
        return self.main.untyped_storage().data_ptr() == self.model.untyped_storage().data_ptr()


class UpdateLine:
    """Snapshot, move and restore the shards of one optimizer step.

    Call :meth:`begin` before the step and :meth:`end` after it. In between the memory of one copy
    of the shards' main parameters is taken; :meth:`end` takes a second one for the shards whose
    main parameter is the model's own, or packed.

    Args:
        shards: of the parameters.
        offload: keep the copies on the host, in pinned memory where there is a GPU.
        clipped: whether training changes model and main parameters, each by itself, after the step
            and before the line is left. Then call :meth:`keep` once it has.

    Attributes:
        parts: the numbers of the parts of the model that each shard is of, in their order.
    """

    def __init__(
        self, shards: Sequence[Shard], *, offload: bool = False, clipped: bool = False
    ) -> None:
        self.shards = shards
        self.offload = offload
        self.clipped = clipped
        self.parts: Sequence[Sequence[int]] = [()] * len(shards)
        self._starts: list[Tensor] = []
        self._ends: list[Tensor] = []
        #: At θ_t and θ_{t+1} the model's own bits of the shards that are not rounded main ones.
        self._bits: dict[float, list[Tensor | None]] = {}
        #: The model's bits where it is left in the end, if that is not θ_{t+1}.
        self._left: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where the model's shards lie."""
        return self.shards[0].model.device if self.shards else torch.device("cpu")

    @torch.no_grad()
    def begin(self) -> None:
        """Keep θ_t."""
        self._starts = [self._values(shard) for shard in self.shards]
        self._bits = {0.0: self._model_bits()}

    @torch.no_grad()
    def end(self, shards: Sequence[Shard] | None = None) -> None:
        """Take θ_{t+1}: the main parameters themselves, or a copy where they are overwritten.

        Args:
            shards: where the same elements lie now, if a step may put tensors in others' places.
        """
        self.shards = self.shards if shards is None else shards
        self._ends = [
            self._values(shard) if self.clipped or shard.aliased else shard.main.detach()
            for shard in self.shards
        ]
        self._bits[1.0] = self._model_bits()

    @torch.no_grad()
    def move(self, fraction: float, part: int | None = None) -> None:
        """Write θ_t + fraction·(θ_{t+1} − θ_t) into the model; 0 and 1 are exact copies.

        The sum is taken in the main parameters' precision and rounded once. Adding to bf16 weights
        in place would lose the small updates.

        Args:
            fraction: of the update.
            part: the number of the part that is moved; what is of others is at θ_t.
        """
        for number in range(len(self.shards)):
            moves = part is None or part in self.parts[number]
            self._write(number, fraction if moves else 0.0)

    def _write(self, number: int, fraction: float) -> None:
        """One shard's :meth:`move`."""
        shard, start, end = self.shards[number], self._starts[number], self._ends[number]
        own = self._bits[fraction][number] if fraction in self._bits else None
        if own is not None:
            shard.model.copy_(own, non_blocking=True)
            return
        if fraction in (0.0, 1.0):
            exact = end if fraction else start
            shard.model.copy_(exact.view_as(shard.model), non_blocking=True)
            return
        device = shard.model.device
        for a, b, point in _chunks(start, end, shard.model):
            a, b = a.to(device, non_blocking=True), b.to(device, non_blocking=True)
            if point.dtype == a.dtype:
                torch.lerp(a, b, fraction, out=point)
            else:
                point.copy_(torch.lerp(a, b, fraction))

    @torch.no_grad()
    def keep(self) -> None:
        """Keep the model as it is: it is left so, and not at θ_{t+1}."""
        self._left = [self._copy(shard.model) for shard in self.shards]

    @torch.no_grad()
    def leave(self) -> None:
        """Write θ_{t+1} into the model, or what was kept."""
        if not self._left:
            self.move(1.0)
            return
        for shard, own in zip(self.shards, self._left, strict=True):
            shard.model.copy_(own)

    @torch.no_grad()
    def undo(self) -> None:
        """Take the step back: write θ_t into the main parameters."""
        for shard, start in zip(self.shards, self._starts, strict=True):
            if shard.packed is None:
                shard.main.copy_(start)
            else:
                shard.packed.pack(start.to(shard.model.device))

    @torch.no_grad()
    def products(
        self, gradients: Iterable[Tensor | None], total: Tensor, read_in: torch.dtype | None = None
    ) -> None:
        """Add the :class:`~megatron_sharpness.core.products.StepProducts` of the shards that count,
        to those of the whole model, and to those of each part that a shard is of.

        Args:
            gradients: for each shard the gradient that the step used, of the elements of
                ``Shard.main``, or None where there is none.
            total: what they are added to, field by field; fp64, [1 + parts, fields].
            read_in: the type that the forward pass casts weights to, where it is coarser than the
                model's.
        """
        for number, gradient in zip(range(len(self.shards)), gradients, strict=True):
            self.add_products(number, gradient, total, read_in)

    @torch.no_grad()
    def add_products(
        self, number: int, grad: Tensor | None, total: Tensor, read_in: torch.dtype | None = None
    ) -> None:
        """The same of one shard, by its number."""
        shard, start, end = self.shards[number], self._starts[number], self._ends[number]
        if not shard.counted:
            return
        device = shard.model.device
        precision = torch.promote_types(start.dtype, torch.float32)
        types = [shard.model.dtype] if read_in is None else [shard.model.dtype, read_in]
        coarsest = max(types, key=lambda dtype: torch.finfo(dtype).eps)
        rows = [0, *(1 + part for part in self.parts[number])]
        for a, b, *g in _chunks(start, end, *([] if grad is None else [grad])):
            weights = a.to(device, precision)
            update = weights - b.to(device, precision)
            gradient = g[0].to(device, precision) if g else None
            sums = product_sums(weights, update, gradient, coarsest).to(total.device)
            for row in rows:
                total[row] += sums

    def _values(self, shard: Shard) -> Tensor:
        """A copy of the main parameters."""
        if shard.packed is None:
            return self._copy(shard.main)
        values = shard.packed.unpack()
        return self._copy(values) if self.offload else values

    def _model_bits(self) -> list[Tensor | None]:
        return [
            self._copy(shard.model) if self.clipped or shard.packed is not None else None
            for shard in self.shards
        ]

    def _copy(self, tensor: Tensor) -> Tensor:
        if not self.offload:
            return tensor.detach().clone()
        host = torch.empty(
            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda"
        )
        return host.copy_(tensor.detach())


def _chunks(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of all, at most about :data:`CHUNK` at a time."""
    tensors = [first, *(other.view_as(first) for other in others)]
    if first.dim() == 0:
        return iter([tuple(tensors)])
    rows = max(1, CHUNK * len(first) // max(1, first.numel()))
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
