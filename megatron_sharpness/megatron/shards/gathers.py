"""What every way of sharding says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_sharpness.core.update_line import Packed


class Stepped(NamedTuple):
    """A parameter that an optimizer steps, as far as this rank does.

    Attributes:
        parameter: what the optimizer has in its groups.
        main: the elements of it that this rank steps.
        model: where the forward pass reads the same elements.
        gradient: of the same elements, as the step has used it; None where there is none.
        clipped: whether ``gradient`` is what was clipped, and not what it was before.
        packed: what has the elements where ``main`` is but the optimizer's name for them.
        weight: what the model calls by a name, where that is not ``parameter``.
        start: where in the flattened weight the elements begin.
    """

    parameter: Tensor
    main: Tensor
    model: Tensor
    gradient: Tensor | None
    clipped: bool = True
    packed: Packed | None = None
    weight: Tensor | None = None
    start: int = 0

    @classmethod
    def of(cls, main: Tensor, model: Tensor, buffered: Tensor | None, weight: Tensor) -> Stepped:
        """A main parameter whose gradient is ``main.grad``, of what lies in ``buffered``.

        A graph of the optimizer's step sets no attributes. It has clipped what lies in the buffer,
        or, where that is in 16 bits, an fp32 copy that nobody has.
        """
        if main.grad is not None or buffered is None:
            return cls(main, main, model, main.grad, weight=weight)
        clipped = buffered.dtype == main.dtype
        return cls(main, main, model, buffered, clipped=clipped, weight=weight)


class Gathers:
    """How what the ranks step comes together for a forward pass. Here: each rank has the whole."""

    def scratch(self) -> list[object]:
        """What holds no more than what passes gather before they read it."""
        return []

    def settle(self) -> None:
        """Wait for gathers in flight, and keep Megatron's account of them as it is after a step."""

    def sync(self) -> None:
        """Have the next forward pass see the shards of all ranks. :meth:`finish` must follow it."""

    def finish(self) -> None:
        """The gathers that a pass did not make since it broke off: the other ranks wait in them."""

    def end(self) -> None:
        """The gathers that are left to make, and Megatron's account as it was after the step."""
        self.put_account_back()

    def put_account_back(self) -> None:
        """Have Megatron take for gathered what it did after the step."""


class AllGathers(Gathers):
    """Those of all ways of sharding that a model has."""

    def __init__(self, members: Sequence[Gathers]) -> None:
        self.members = members

    def scratch(self) -> list[object]:
        return [held for member in self.members for held in member.scratch()]

    def settle(self) -> None:
        for member in self.members:
            member.settle()

    def sync(self) -> None:
        for member in self.members:
            member.sync()

    def finish(self) -> None:
        for member in self.members:
            member.finish()

    def end(self) -> None:
        for member in self.members:
            member.end()

    def put_account_back(self) -> None:
        for member in self.members:
            member.put_account_back()
