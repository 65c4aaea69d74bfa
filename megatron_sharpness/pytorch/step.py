"""One training step, observed while it is made and evaluated again along its update."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from megatron_sharpness.core.checks import EXACT, SAME, is_exact
from megatron_sharpness.core.errors import ProbeError
from megatron_sharpness.core.megatron_fsdp import is_sharded
from megatron_sharpness.core.products import StepProducts
from megatron_sharpness.core.replay import RandomStates, all_max, all_sum, first_error, reduce_loss
from megatron_sharpness.core.second_moments import Source
from megatron_sharpness.core.state import State
from megatron_sharpness.core.step import Step
from megatron_sharpness.core.watch import Checksums, Watch
from megatron_sharpness.pytorch.losses import (
    Evaluate,
    LossSum,
    explained,
    sums_of,
    training_loss_of,
    whole,
)
from megatron_sharpness.pytorch.optimizer import ModelOnLines, ObservedOptimizer, largest_rates
from megatron_sharpness.pytorch.parts import PartsOfModel
from megatron_sharpness.pytorch.passes import (
    OTHER_DRAWS,
    RecordedPasses,
    collective_device,
    state_of,
)
from megatron_sharpness.pytorch.pipelines import PipelinedModel
from megatron_sharpness.pytorch.second_moments import sources_of
from megatron_sharpness.pytorch.shards import OF_PASSES, local


class LossAt(Protocol):
    """The mean loss and the number of tokens of all ranks at θ_t + fraction·(θ_{t+1} − θ_t), or
    where that is so for one part of the model, and the others are at θ_t."""

    def __call__(self, fraction: float, part: str | None = None) -> tuple[float, int]: ...


#: The same of the losses of these names.
LossesAt = Callable[[float, Sequence[str]], dict[str, tuple[float, int]]]


#: Why a step was skipped.
NOT_CALLED = (
    "optimizer.step() was not called since the last after_step, and the weights are what they were "
    "(a loss scaler skips steps whose gradients overflow; and where gradients are accumulated "
    "after_step is to be called once for each step of the optimizer)"
)
NOT_MOVED = "optimizer.step() has left all weights as they were"

#: Relative difference up to which the ranks' norms are one that was rounded.
SAME_NORM = 1e-3

#: Why a clipped step was not measured.
OTHER_NORM = (
    "grad_norm is not the same on all ranks, as of the parameters that each rank holds: gradients "
    "are to be clipped by the norm of all of them, and that is to be given"
)


class ObservedStep:
    """Watches a model and its optimizers through the next step.

    Attributes:
        error: why the step cannot be measured, if that is known from without.
        changes: what the watch has found that the measurement has changed; None without a watch.

    Args:
        model: as the loop calls it.
        optimizers: all that step its parameters.
        keep: objects beside the model that a forward pass changes, by name.
        offload: keep the copies of the parameters in host memory.
        parts: of the model, that can be moved alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        keep: Mapping[str, object],
        offload: bool,
        parts: PartsOfModel | None = None,
    ) -> None:
        self.error: Exception | None = None
        self.changes: list[str] | None = None
        self._model = model
        self._keep = keep
        self._passes = RecordedPasses(model, keep, lambda: self._is_over)
        self._optimizers = [
            ObservedOptimizer(
                entry,
                lambda: self._passes.read_in,
                offload=offload,
                parts=parts,
                first_rank=model.first_rank if isinstance(model, PipelinedModel) else 0,
            )
            for entry in optimizers
        ]
        self._parts = parts.names if parts else ()
        self._now = State({})
        self._loss_given = False
        self._ambiguous = self._strayed = False
        try:
            self._left_out = self._weights_left_out()
        except Exception as caught:  # out of memory, say: the loop goes on
            self.error = caught

    @property
    def passes_seen(self) -> int:
        """How often the training step has called the model so far."""
        return len(self._passes.passes)

    @property
    def joining(self) -> bool:
        """Whether the other ranks may have left the loop: under DDP's ``join``."""
        return self._passes.joining

    @property
    def _is_over(self) -> bool:
        return all(seen.steps for seen in self._optimizers)

    def find_error(self) -> None:
        """Keep what is to be put back, and see whether the weights are where the update has ended;
        else that is the error."""
        inspected = (seen.inspect() for seen in self._optimizers)
        self.error = self.error or self._passes.error or next(filter(None, inspected), None)
        try:
            if self.error is None and self._left_out != self._weights_left_out():
                self.error = ProbeError(
                    "parameters of the model have changed that no optimizer given steps, so that "
                    "the line is not the whole update; give all optimizers of the step, in a list. "
                    "One that steps fp32 copies beside the model cannot be followed: keep the "
                    "weights themselves in fp32, and compute in 16 bits under autocast"
                )
            self._now = state_of(model=self._model, **self._keep)
        except Exception as caught:  # out of memory, say
            self.error = self.error or caught

    def check_draws(self, seen: Step, loss_at: LossAt) -> str | None:
        """Why the record is not to be believed, if so. Collective.

        Where the evaluation has drawn other numbers than the step between the passes, they matter
        or not: that is seen from L(θ), evaluated once more.
        """
        strayed = torch.tensor([self._strayed], dtype=torch.float64)
        if not all_max(strayed, collective_device()).item() or seen.training_loss is None:
            return None
        try:
            loss, _ = loss_at(0.0)
        except ProbeError as error:
            return str(error)
        off = abs(loss - seen.training_loss)
        as_trained = off <= max(SAME * abs(loss), EXACT) if seen.coarse else is_exact(off, loss)
        return None if as_trained else f"L(θ) is off by {off:.3g} nat: {OTHER_DRAWS}"

    def _weights_left_out(self) -> Checksums:
        """Of parameters that train, and that no optimizer given steps."""
        if any(isinstance(m, FSDPModule) or is_sharded(m) for m in self._model.modules()):
            return Checksums([])  # whose parameters are others in a pass
        given = {id(parameter) for seen in self._optimizers for parameter in seen.shards.of_model()}
        left_out = [p for p in self._model.parameters() if p.requires_grad and id(p) not in given]
        return Checksums(local(p) for p in left_out if not is_lazy(p))

    def second_moments(self) -> list[Source]:
        """Where those of Adam lie."""
        return sources_of(self._model, [seen.shards for seen in self._optimizers])

    def check_undoable(self, number: int) -> None:
        """Collective.

        Raises:
            RuntimeError: the step cannot be taken back.
        """
        failed = torch.tensor([self.error is not None], dtype=torch.float64)
        if all_max(failed, collective_device()).item():
            raise RuntimeError(f"step {number} cannot be taken back: {first_error(self.error)}")

    def release(self) -> None:
        """Take all hooks off and give the copies back."""
        self._passes.release()
        for optimizer in self._optimizers:
            optimizer.release()

    @contextlib.contextmanager
    def replaying(
        self,
        evaluate: Evaluate,
        others: Mapping[str, Evaluate],
        *,
        eval_mode: bool,
        frozen: bool,
        watched: bool,
    ) -> Iterator[tuple[LossAt, LossesAt]]:
        """The loss along the update, or along that of a part alone, and those on other data; in the
        end all is as it was.

        Args:
            evaluate: the step's own micro-batches through the model.
            others: other data through it, by name; in evaluation mode.
            eval_mode: whether ``evaluate`` is called in evaluation mode, too.
            frozen: end at θ_t and not at θ_{t+1}, with the state from before the step.
            watched: compare everything that training reads later in the end. Collective.
        """
        lines = ModelOnLines(self._model, self._optimizers)
        watch = None
        if watched and not frozen:
            lines.sync()  # the weights as the shards that they are in the end, too
            watch = Watch(self._everything, ignored=OF_PASSES)
        states = RandomStates()
        training = [(module, module.training) for module in self._model.modules()]
        moved = frozen

        def set_modes(*, as_trained: bool) -> None:
            for module, flag in training:
                module.training = flag and as_trained

        def move(fraction: float, part: str | None = None) -> Exception | None:
            nonlocal moved
            moved = True
            error: Exception | None = None
            try:
                lines.move(fraction, None if part is None else self._parts.index(part))
            except Exception as caught:
                error = caught
            lines.sync()
            return error

        def reduced(
            function: Evaluate, error: Exception | None, check: Callable[[Tensor | float], None]
        ) -> tuple[float, int]:
            loss: Tensor | float = 0.0
            tokens: Tensor | float = 0.0
            try:  # whatever failed before: the other ranks wait in the model's collectives
                with torch.no_grad():
                    loss, tokens = sums_of(function())
                check(tokens)
            except Exception as caught:
                error = error or explained(caught)
            return reduce_loss(loss, tokens, error, collective_device())

        def count_passes() -> None:
            """Passes without gradients are the step's own if the evaluation makes them, too."""
            self._ambiguous = False
            again = contextlib.suppress(Exception)  # whatever it is, it comes again
            with self._passes.replaying(strict=True) as replay, torch.no_grad(), again:
                evaluate()
            self._passes.choose(replay.calls)

        def loss_at(fraction: float, part: str | None = None) -> tuple[float, int]:
            error = move(fraction, part)
            set_modes(as_trained=not eval_mode)
            if self._ambiguous and not eval_mode:
                count_passes()
            with self._passes.replaying(strict=not eval_mode) as replay:

                def check(tokens: Tensor | float) -> None:
                    if isinstance(self._model, PipelinedModel):
                        self._model.check(replay.calls, tokens)
                    replay.check(known=self._loss_given)

                found = reduced(evaluate, error, check)
            self._strayed |= replay.strayed
            return found

        def losses_at(fraction: float, names: Sequence[str]) -> dict[str, tuple[float, int]]:
            error = move(fraction)
            set_modes(as_trained=False)
            found = {}
            for name in names:
                self._now.restore()
                states.restore()
                torch.clear_autocast_cache()
                with self._passes.elsewhere():
                    found[name] = reduced(others[name], error, lambda tokens: None)
            return found

        try:
            with self._passes.undisturbed():
                yield loss_at, losses_at
        finally:
            if moved:
                lines.move(0.0 if frozen else 1.0)
                if frozen:
                    lines.undo()
                lines.sync()
            set_modes(as_trained=True)
            self._now.restore()
            if frozen and self._passes.passes:
                self._passes.restore()
            states.restore()
        if watch is not None:
            self.changes = watch.changes(collective_device())

    def _everything(self) -> dict[str, object]:
        """What training reads later."""
        model = self._model
        optimizers = [o for s in self._optimizers for o in (s.optimizer, *s.shards.inside())]
        names = [f"optimizer {i}" if i else "optimizer" for i in range(len(optimizers))]
        shards = [shard for seen in self._optimizers for shard in seen.shards.shards()]
        return {
            "model": model,
            **(model.called_by_schedule() if isinstance(model, PipelinedModel) else {}),
            "read by its forward passes": [s.model for s in shards if not s.aliased],
            **dict(zip(names, optimizers, strict=True)),
            **self._keep,
            "random states": RandomStates().values(),
        }

    def agree(
        self,
        number: int,
        *,
        trained: bool,
        loss: LossSum | None,
        grad_norm: Tensor | float | None,
        consumed_samples: int | None,
    ) -> Step:
        """The step as all ranks see it. Collective.

        Args:
            number: of the step.
            trained: whether the probes evaluate the loss that was differentiated.
            loss: this rank's part of the training loss, as ``evaluate`` would return it.
            grad_norm: of all gradients, before they were clipped.
            consumed_samples: for the record.
        """
        started = time.perf_counter()
        self._loss_given = loss is not None
        error = self.error
        stepped = [seen for seen in self._optimizers if seen.steps or seen.idle]
        rates = [(seen.lr, seen.weight_decay) for seen in stepped] or [
            largest_rates(seen.shards.groups()) for seen in self._optimizers
        ]
        norm = 0.0
        if grad_norm is not None and not 0.0 < (norm := float(whole(grad_norm))) < math.inf:
            norm = 0.0
        flags = torch.tensor(
            [
                norm,
                -norm,
                error is not None,
                not stepped,
                self._passes.coarse,
                self._passes.ambiguous,
                not all(seen.slope_known for seen in stepped),
                *(max(rate) for rate in zip(*rates, strict=True)),
            ],
            dtype=torch.float64,
        )
        norm, lowest, failed, skipped, coarse, self._ambiguous, no_slope, lr, decay = all_max(
            flags, collective_device()
        ).tolist()
        seen = Step(
            iteration=number,
            consumed_samples=consumed_samples,
            lr=lr,
            weight_decay=decay,
            beta1=_beta1(self._optimizers),
            trained=trained,
            coarse=bool(coarse),
            skipped=NOT_CALLED if skipped else None,
            failed=first_error(error) if failed else None,
            started=started,
        )
        seen = seen.with_parts(self._parts)
        if failed or skipped or lr == 0.0:
            return seen
        sums = torch.stack([seen.products.cpu() for seen in stepped]).sum(dim=0)
        summed = all_sum(sums.flatten(), collective_device()).view_as(sums)
        products = [StepProducts(*row) for row in summed.tolist()]
        # A fused optimizer under loss scaling decides on the device whether it steps.
        if products[0].squared_update == 0.0:
            return dataclasses.replace(seen, skipped=NOT_MOVED)
        if norm > -lowest * (1.0 + SAME_NORM):
            return dataclasses.replace(seen, failed=OTHER_NORM)
        clip = math.sqrt(products[0].squared_gradient) / norm if norm else 1.0
        try:
            training_loss = training_loss_of(loss) if trained else None
        except ProbeError as caught:
            return dataclasses.replace(seen, failed=str(caught))
        seen = dataclasses.replace(seen, training_loss=training_loss).with_parts(self._parts)
        seen = seen.along(products, clip)
        return seen.without_slope() if no_slope else seen


def _beta1(observed: Sequence[ObservedOptimizer]) -> float | None:
    """β₁ where all that steps is Adam with the same one."""
    steppers = [s for seen in observed for s in seen.shards.inside() or [seen.optimizer]]
    if not all("Adam" in type(optimizer).__name__ for optimizer in steppers):
        return None
    groups = [group for seen in observed for group in seen.shards.groups()]
    found = {float(group["betas"][0]) for group in groups if "betas" in group}
    return found.pop() if len(found) == 1 else None
