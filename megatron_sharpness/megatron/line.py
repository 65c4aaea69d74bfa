"""The line of an optimizer step over all of Megatron's optimizers, written into its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_sharpness.core.products import StepProducts
from megatron_sharpness.core.update_line import UpdateLine
from megatron_sharpness.core.watch import Checksums
from megatron_sharpness.megatron import engine
from megatron_sharpness.megatron.parts import PartsOfModel
from megatron_sharpness.megatron.shards import Leaf, gathers_of, leaves_of


class MegatronLine:
    """One optimizer step's line over all leaf optimizers, written into Megatron's model.

    Args:
        model: the model chunks of this rank, as ``train_step`` gets them.
        optimizer: the ``MegatronOptimizer`` that steps them.
        offload: keep the copies in host memory.
        clipped: whether the step's weights are changed once more, which is no part of the update
            (``--qk-clip``): they are left so in the end.
        parts: of the model, that can be moved alone.
    """

    def __init__(
        self,
        model: Sequence[Any],
        optimizer: Any,
        *,
        offload: bool,
        clipped: bool = False,
        parts: PartsOfModel | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.offload = offload
        self.clipped = clipped
        self.parts = parts
        self.lines: list[tuple[UpdateLine, Leaf]] = []
        self.gathers = gathers_of(model, optimizer)
        self.is_open = False

    @property
    def coarse(self) -> bool:
        """Whether this rank has a part of a model in 16 bits, or in 8."""
        shards = [shard for line, _ in self.lines for shard in line.shards]
        small = any(shard.model.dtype.itemsize < 4 for shard in shards)
        return small or engine.quantizes(self.model)

    def begin(self) -> None:
        """Keep θ_t of all that the optimizer is about to step."""
        self.is_open = False
        self.lines = [
            (UpdateLine(leaf.shards(), offload=self.offload, clipped=self.clipped), leaf)
            for leaf in leaves_of(self.optimizer)
        ]
        for line, _ in self.lines:
            line.begin()

    def weights(self) -> Checksums:
        """Of this rank's shards, in the model and in the optimizer."""
        shards = [shard for line, _ in self.lines for shard in line.shards]
        return Checksums(t for s in shards for t in ((s.main,) if s.aliased else (s.main, s.model)))

    def gather(self) -> None:
        """Have the shards of all ranks in the model, as they are. Collective."""
        self.gathers.settle()
        self.gathers.sync()
        self.gathers.finish()
        self.gathers.put_account_back()

    def end(self) -> None:
        """Take θ_{t+1}, and the gathers that the next forward pass would have waited for."""
        for line, leaf in self.lines:
            line.end(leaf.shards())  # a step may put tensors in others' places
            if self.parts is not None:
                line.parts = self.parts.of_shards(leaf)
        self.is_open = True
        self.gathers.settle()

    def keep(self) -> None:
        """Keep the weights as they are: the model is left so, wherever the line ends."""
        for line, _ in self.lines:
            line.keep()

    def move(self, fraction: float, part: int | None = None) -> None:
        """Write this rank's shards of θ(fraction), or of that in one part and of θ_t elsewhere. The
        gathers must follow on all ranks."""
        for line, _ in self.lines:
            line.move(fraction, part)

    def restore(self, *, frozen: bool = False) -> None:
        """θ_{t+1} back into the model, or what was kept, and Megatron's account of its gathers.

        With ``frozen`` it is θ_t, and the optimizer's main parameters are put back, too.
        Collective, and nothing at all once the line was released.
        """
        if not self.is_open:
            return
        for line, _ in self.lines:
            if frozen:
                line.move(0.0)
                line.undo()
            else:
                line.leave()
        self.gathers.sync()
        self.gathers.end()
        self.release()

    def release(self) -> None:
        """Give the copies back."""
        self.is_open = False
        self.lines = []

    def products(self, clip: float) -> Tensor:
        """The fields of :class:`StepProducts` over all ranks, of the whole model and of each part;
        fp64, [1 + parts, fields].

        g is the main gradient that the step has used, clipped as it was. Summed as Megatron sums
        the gradient norm: each optimizer over its own groups of ranks.

        Args:
            clip: what Megatron has multiplied the gradients by.
        """
        device = torch.cuda.current_device()
        rows = 1 + (len(self.parts.names) if self.parts is not None else 0)
        total = torch.zeros(rows, StepProducts.COUNT, dtype=torch.float64, device=device)
        for line, leaf in self.lines:
            partial = torch.zeros_like(total)
            line.products(leaf.gradients(clip), partial, engine.weights_type(self.model))
            total += leaf.sum_up(partial)
        return total
