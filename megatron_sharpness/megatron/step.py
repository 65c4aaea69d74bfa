"""One optimizer step of megatron-core's, observed and measured, whichever loop makes it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_sharpness.core.errors import ProbeError
from megatron_sharpness.core.measurement import Records
from megatron_sharpness.core.meter import Meter
from megatron_sharpness.core.products import StepProducts
from megatron_sharpness.core.replay import all_max, first_error
from megatron_sharpness.core.step import Step
from megatron_sharpness.core.watch import Checksums, Watch
from megatron_sharpness.data.evaluation import EvaluationSet
from megatron_sharpness.megatron import engine
from megatron_sharpness.megatron.line import MegatronLine
from megatron_sharpness.megatron.parts import PartsOfModel
from megatron_sharpness.megatron.replay import (
    Loss,
    MicroBatches,
    RecordingSchedule,
    current_device,
)
from megatron_sharpness.megatron.second_moments import sources_of
from megatron_sharpness.megatron.watch import watch_over

#: Why Megatron does not step.
SKIPPED = "Megatron has skipped this step: its gradients overflow at this loss scale"

#: What a self-test can see of probes beside what it sees at θ.
OVERWRITTEN = (
    "a forward pass has changed the weights that it was to read: they are held somewhere else, "
    "too, and were put back"
)


class ObservedStep:
    """One optimizer step seen from both sides, its learning rate and its outcome.

    Args:
        optimizer: the ``MegatronOptimizer`` that makes the step.
        model: the model chunks of this rank.
        options: what has ``optimizer``, ``adam_beta1`` and ``clip_grad``: an ``OptimizerConfig``,
            or Megatron's arguments.
        offload: keep the copies of the parameters in host memory.
        parts: of the model, that are to be measured by themselves, too.
    """

    def __init__(
        self,
        optimizer: Any,
        model: Any,
        options: Any,
        *,
        offload: bool,
        parts: PartsOfModel | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.options = options
        clipped = bool(getattr(options, "qk_clip", False))
        self.line = MegatronLine(model, optimizer, offload=offload, clipped=clipped, parts=parts)
        self._parts = parts.names if parts is not None else ()
        self.happened = False
        self._rates = (-1.0, -1.0)
        self._outcome: tuple[bool, float | None] = (False, None)
        self._error: Exception | None = None
        self._left: Checksums | None = None
        self._verifies = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it ``optimizer.step`` keeps θ_t before it steps."""
        attributes = vars(self.optimizer)
        replaced = attributes.get("step")  # a graph wrapper may have been set on the instance
        step = self.optimizer.step

        def watched_step(*args: Any, **kwargs: Any) -> Any:
            self._before()
            result = step(*args, **kwargs)
            self._outcome = (bool(result[0]), result[1])
            self.happened = True
            self._after()
            return result

        self.optimizer.step = watched_step
        try:
            yield
        finally:
            if replaced is None:
                del self.optimizer.step
            else:
                self.optimizer.step = replaced

    def fail(self, error: Exception) -> None:
        """Have the measurement given up, on all ranks, for what went wrong on this one."""
        self._error = self._error or error

    def watch(self) -> Watch | None:
        """A watch over all that training reads later; None where no step was made. Collective."""
        if not self._outcome[0]:
            return None
        self._end()
        return watch_over(self.line, self.optimizer)

    def measure(
        self,
        meter: Meter,
        schedule: RecordingSchedule,
        *,
        iteration: int,
        consumed_samples: int,
        trained: bool,
        others: Sequence[EvaluationSet] = (),
        frozen: bool = False,
    ) -> Records:
        """Measure the step, and leave the model at θ_{t+1}. Collective.

        Args:
            meter: what measures it.
            schedule: what has recorded its passes.
            iteration: number of the step.
            consumed_samples: samples trained on up to and with it.
            trained: whether the probes evaluate the loss that was trained on.
            others: other data, whose losses are searched along the same update.
            frozen: leave the model at θ_t, and the optimizer's main parameters.

        Returns:
            The records, for the meter to write.
        """
        self._verifies = bool(meter.self_tested) and meter.watches
        step = self._agree(iteration, consumed_samples, schedule, trained)
        leaves = [leaf for _, leaf in self.line.lines]
        step = meter.with_second_moments(
            step, lambda: sources_of(leaves, self.line.model), current_device()
        )
        if frozen and step.failed is not None:
            raise RuntimeError(f"iteration {iteration} could not be taken back: {step.failed}")

        batches: dict[str, MicroBatches] = {}

        def losses_at(eta: float, names: Sequence[str]) -> dict[str, tuple[float, int]]:
            if not batches:
                batches.update(_made_ready(schedule, others))
            passes = [partial(schedule.evaluate, batches[name]) for name in names]
            reduce = partial(schedule.reduce, per_token=True)
            found = self._probe(eta / step.lr, passes, reduce)
            return dict(zip(names, found, strict=True))

        def loss_at(eta: float, part: int | None = None) -> tuple[float, int]:
            reduce = partial(schedule.reduce, per_token=schedule.per_token)
            return self._probe(eta / step.lr, [schedule.replay], reduce, part)[0]

        def part_loss_at(part: str, eta: float) -> tuple[float, int]:
            return loss_at(eta, self._parts.index(part))

        try:
            names = [samples.name for samples in others]
            return meter.measure(step, loss_at, names, losses_at, part_loss_at)
        finally:
            self.line.restore(frozen=frozen)

    def undo(self) -> None:
        """Take the step back. Collective.

        Raises:
            RuntimeError: what was before it could not be kept.
        """
        if self._outcome[0]:
            self._end()
        if self._error is not None:
            raise RuntimeError("an optimizer step could not be taken back") from self._error
        if self._outcome[0]:
            self.line.restore(frozen=True)
        self.line.release()

    def _before(self) -> None:
        try:
            self._rates = _rates(self.optimizer.param_groups)
            self.line.begin()
        except Exception as caught:  # out of memory, say: the step itself goes on
            self._error = caught
            self.line.release()

    def _after(self) -> None:
        try:
            if self.line.clipped and self._outcome[0]:
                self.line.end()  # what comes now is no part of the update
            else:
                self._left = self.line.weights()
        except Exception as caught:
            self._error = caught

    def _agree(
        self, iteration: int, consumed_samples: int, schedule: RecordingSchedule, trained: bool
    ) -> Step:
        """The step as all ranks see it, ready for probes. Collective."""
        started = time.perf_counter()
        success, grad_norm = self._outcome
        if success:
            self._end()
        self._error = self._error or schedule.error
        flags = torch.tensor(
            [
                self._error is not None,
                not success,
                schedule.first,
                self.line.coarse,
                *self._rates,
            ],
            dtype=torch.float64,
        )
        failed, skipped, first, coarse, lr, weight_decay = all_max(flags, current_device()).tolist()
        lr, weight_decay = max(lr, 0.0), max(weight_decay, 0.0)
        seen = Step(
            iteration=iteration,
            consumed_samples=consumed_samples,
            lr=lr,
            weight_decay=weight_decay,
            beta1=self.options.adam_beta1 if self.options.optimizer == "adam" else None,
            coarse=bool(coarse),
            skipped=SKIPPED if skipped else engine.FIRST_PASS if first else None,
            failed=first_error(self._error) if failed else None,
            started=started,
        )
        if failed or seen.skipped or lr == 0.0:
            self.line.release()
            return seen.with_parts(self._parts)
        loss, _ = schedule.reduce(schedule.losses, None, per_token=schedule.per_token)
        clip = self._clip_coefficient(grad_norm)
        sums = self.line.products(clip)
        # The norm, too, may differ between ranks in its last bits, and with it all that follows.
        agreed = torch.cat((sums.flatten(), sums.new_tensor([clip])))
        dist.broadcast(agreed, src=0)
        clip = agreed[-1].item()
        seen = dataclasses.replace(
            seen,
            trained=trained,
            training_loss=loss if trained else None,
            terms=schedule.terms,
        ).with_parts(self._parts)
        rows = agreed[:-1].view_as(sums).tolist()
        return seen.along([StepProducts(*row) for row in rows], clip)

    def _end(self) -> None:
        """Take θ_{t+1}, once, where the weights are what the step has left.

        Of a step whose weights were clipped since, that was taken before; these are kept.
        """
        if self._error is not None or (self.line.is_open and not self.line.clipped):
            return
        try:
            if self.line.is_open:
                self.line.keep()
                return
            if self._left != self.line.weights():
                raise ProbeError(
                    "the weights were changed between the optimizer's step and the measurement, so "
                    "that they lie off the update; they were left as they are. Change them after "
                    "train_step, or before the step"
                )
            self.line.end()
        except Exception as caught:
            self._error = caught

    def _clip_coefficient(self, grad_norm: float | None) -> float:
        """What Megatron has multiplied the gradients by (clip_grads.py)."""
        limit = float(self.options.clip_grad)
        if not limit or not grad_norm:
            return 1.0
        return min(1.0, limit / (float(grad_norm) + 1e-6))

    def _probe(
        self,
        fraction: float,
        passes: Sequence[Callable[[], list[Loss]]],
        reduce: Callable[..., tuple[float, int]],
        part: int | None = None,
    ) -> list[tuple[float, int]]:
        """The loss of each forward pass at θ_t + fraction·(θ_{t+1} − θ_t), and its tokens; or where
        one part of the model is there, and the others at θ_t.

        They are the same numbers on every rank. One that could not write its weights makes the
        collectives that the others wait in all the same, and says so in the reduction of the loss.
        While a run tests itself it is seen, too, that the passes leave the weights as they are.
        """
        error: Exception | None = None
        try:
            self.line.move(fraction, part)
        except Exception as caught:
            error = caught
        written = self.line.weights() if self._verifies and error is None else None
        self.line.gathers.sync()
        found = []
        for run in passes:
            losses = None
            try:
                losses = run()
            except Exception as caught:
                error = error or caught
            self.line.gathers.finish()
            if written is not None and written != self.line.weights():
                error = error or ProbeError(OVERWRITTEN)
            found.append(reduce(losses, error))
        return found


def _rates(groups: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Learning rate and weight decay of the groups whose rate Megatron logs; -1 where none is here.

    Groups with a rate of their own (``--decoupled-lr``) are not ``default_config``. All move by the
    common factor η/lr on their own.
    """
    logged = [group for group in groups if group.get("default_config", True)]
    return (
        max((float(group["lr"]) for group in logged), default=-1.0),
        max((float(group["weight_decay"]) for group in logged), default=-1.0),
    )


def _made_ready(
    schedule: RecordingSchedule, others: Sequence[EvaluationSet]
) -> dict[str, MicroBatches]:
    """Other data as micro-batches. Collective.

    Raises:
        ProbeError: it cannot be made on some rank. Inside of the forward pass the other ranks would
            wait for that one.
    """
    made: dict[str, MicroBatches] = {}
    error: Exception | None = None
    try:
        made = {samples.name: schedule.micro_batches(samples) for samples in others}
    except Exception as caught:
        error = caught
    if all_max(torch.tensor([error is not None]).double(), current_device()).item():
        raise ProbeError(first_error(error))
    return made
