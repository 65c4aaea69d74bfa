"""Critical sharpness in a training loop of one's own."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_sharpness.core.errors import ProbeError, SettingError
from megatron_sharpness.core.measurement import Measurement, Records
from megatron_sharpness.core.meter import Meter, Sink
from megatron_sharpness.core.settings import Settings, check_sinks
from megatron_sharpness.core.step import Step
from megatron_sharpness.pytorch.losses import Evaluate, LossSum
from megatron_sharpness.pytorch.parts import PartsOfModel
from megatron_sharpness.pytorch.passes import collective_device
from megatron_sharpness.pytorch.pipelines import PipelinedModel, Schedule, model_of
from megatron_sharpness.pytorch.second_moments import check_has_moments
from megatron_sharpness.pytorch.step import ObservedStep
from megatron_sharpness.pytorch.support import (
    inner_optimizer,
    losses_by_name,
    optimizers_in,
    refuse_unsupported,
)
from megatron_sharpness.report.verdict import log_verdict


class CriticalSharpness:
    """Measures critical sharpness λ_c = 2/η_c of the optimizer's own updates (Def. 2.1).

    ::

        sharpness = CriticalSharpness(model, optimizer, every=100, sinks=[TensorBoardSink(writer)])
        for step, batch in enumerate(loader):
            ...forward, backward...
            optimizer.step()
            record = sharpness.after_step(step, lambda: loss_sum_and_tokens(model, batch))

    A measurement moves the parameters along θ(η) = θ_t + (η/lr)(θ_{t+1} − θ_t), evaluates the loss
    there, and puts everything back: parameters, buffers, random states, training mode. Training
    goes on bit for bit as without it. It takes the memory of two copies of the parameters that
    this rank's optimizers step. In a step that is not due nothing happens.

    Args:
        model: as it is called in the training step: the module itself, or what DDP, ``fully_shard``
            or ``torch.compile`` made of it; or the schedule of ``torch.distributed.pipelining``
            that calls this rank's stages.
        optimizer: one optimizer, or all that step parameters of the model.
        every: measure after the steps that this number divides; 0 is off.
        sinks: where records go. They are written on rank 0 alone.
        mode: ``train`` replays the random states of the step's own forward passes, dropout masks
            and all; ``eval`` puts the model in evaluation mode.
        offload: ``cpu`` keeps the copies in host memory, pinned where there is a GPU.
        losses: losses on other data by name, functions like ``evaluate`` of :meth:`after_step`. At
            each measurement the relative critical sharpness λ_c^{1→2} = 2/η_c^{1→2} (Def. 4.1) of
            each is found along the same update: how far it can go before that loss rises. They are
            evaluated in evaluation mode, and should be of the same data every time.
        frozen: train nothing. Every step is taken back, while the optimizer's moments go on; the
            first so many steps are for the moments alone, and not measured. None, the default,
            trains.
        keep: objects beside the model that a forward pass changes and that training reads later,
            such as a normalizer's running statistics or a generator. What is in them is kept as
            what is in the model is: tensors, numbers, generators, containers of them.
        settings: the other fields of :class:`~megatron_sharpness.core.settings.Settings`.

    Raises:
        InputError: something here cannot be measured with; the message says why and what to do.
    """

    def __init__(
        self,
        model: nn.Module | Schedule,
        optimizer: Optimizer | Sequence[Optimizer],
        every: int = 100,
        sinks: Sequence[Sink] = (),
        *,
        mode: Literal["train", "eval"] = "train",
        offload: Literal["none", "cpu"] = "none",
        losses: Mapping[str, Evaluate] | None = None,
        frozen: int | None = None,
        keep: Sequence[object] = (),
        **settings: Any,
    ) -> None:
        optimizers = [inner_optimizer(entry) for entry in optimizers_in(optimizer)]
        self._settings = Settings.of(self, every=every, **settings)
        self._model = model_of(model)
        refuse_unsupported(self._model, optimizers, mode=mode, offload=offload)
        self._optimizers = optimizers
        self._losses = losses_by_name(losses or {})
        check_sinks(sinks)
        if self._settings.adam_snr:
            check_has_moments(optimizers)
        if not isinstance(keep, Iterable):
            raise SettingError("keep", keep, "give a list of objects")
        if frozen is not None and (not isinstance(frozen, int) or frozen < 0):
            raise SettingError("frozen", frozen, "a number of steps; give 0 or more, or None")
        self._frozen = frozen
        #: Those of the last measurement.
        self.records = Records(())
        self._mode = mode
        self._offload = offload == "cpu"
        self._keep = {f"keep {i} ({type(kept).__name__})": kept for i, kept in enumerate(keep)}
        writes = not dist.is_initialized() or dist.get_rank() == 0
        self._warn: Callable[[str], object] = warnings.warn if writes else lambda message: None
        self._meter = Meter(self._settings, sinks if writes else (), self._warn)
        parts = self._settings.parts
        self._parts = None if parts is None else PartsOfModel(parts, self._model, optimizers)
        self._previous: int | None = None
        self._stride = 1
        self._told = False
        self._said: set[str | None] = set()
        # The number of the first step is not known before it is over.
        self._observed = None
        if every or frozen is not None:
            if isinstance(self._model, PipelinedModel):
                self._model.attach()
            self._observed = self._observe()

    @property
    def armed(self) -> bool:
        """Whether the coming step is observed: its batches are to be kept for ``evaluate``."""
        return self._observed is not None

    def after_step(
        self,
        step: int,
        evaluate: Evaluate,
        *,
        loss: LossSum | None = None,
        grad_norm: Tensor | float | None = None,
        consumed_samples: int | None = None,
    ) -> Measurement | None:
        """Measure the step that the optimizer has just made, where it is due. Collective then.

        Call it once after every optimizer step, on every rank, before anything else changes the
        model.

        Args:
            step: number of the step, consecutive, or growing by the same number each time.
            evaluate: runs the step's own micro-batches through the model, forward only, in the
                order of the training step, and returns this rank's sum of losses and number of
                tokens. A rank that holds no loss, or repeats another's, returns zeros. It is called
                several times, under ``no_grad``.
            loss: what the training step itself has computed: this rank's sum of losses and number
                of tokens, of all its micro-batches, as ``evaluate`` returns them. It saves a pass
                at each measurement, and tells an ``evaluate`` that does not reproduce it.
            grad_norm: L2 norm of all gradients before they were clipped, as ``clip_grad_norm_``
                returns it; None where they were not clipped.
            consumed_samples: samples trained on up to and with this step, for the record.

        Returns:
            The record, or None in a step that is not due.

        Raises:
            ProbeError: the measurement failed, and ``on_error`` is ``raise``.
        """
        try:
            step = operator.index(step)
        except TypeError:
            raise SettingError("step", step, "a step has a whole number; give an int") from None
        observed, self._observed = self._observed, None
        previous = self._count(step)
        try:
            if not self._observes(step):
                return None
            if observed is None:
                observed = self._observe()
                observed.error = ProbeError(
                    f"step {step} came after step {previous}: after_step is to be called after "
                    "every optimizer step, with consecutive numbers"
                )
            elif not observed.passes_seen:
                self._warn(
                    "critical sharpness: the model given was not called in the training step, so "
                    "that its dropout masks cannot be replayed; give it as the loop calls it"
                )
            records = self._measure(
                observed,
                step,
                evaluate,
                loss=loss,
                grad_norm=grad_norm,
                consumed_samples=consumed_samples,
            )
            if records is None:
                return None
            self.records = records
        finally:
            if observed is not None:
                observed.release()
            if self._observes(step + self._stride):
                self._observed = self._observe()
        for measurement in self.records.values():
            if measurement.status == "failed" and measurement.reason not in self._said:
                self._said.add(measurement.reason)
                self._warn(
                    f"critical sharpness of step {step} was not measured: {measurement.reason}"
                )
        return self.records.train

    def scalars(self) -> dict[str, float]:
        """Tag → value of all records of the last measurement, for a logger."""
        return self.records.scalars()

    def close(self) -> None:
        """Observe no further step, and leave model and optimizer without a hook. Where records go
        to a console and to JSON lines, the verdict on the run is said."""
        if self._observed is not None:
            self._observed.release()
            self._observed = None
        if isinstance(self._model, PipelinedModel):
            self._model.detach()
        sinks, self._meter.sinks = self._meter.sinks, ()
        if self._frozen is None:
            log_verdict(sinks)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to measure what an uninterrupted one does; plain numbers."""
        return self._meter.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._meter.load_state_dict(state_dict)

    def _measure(
        self, observed: ObservedStep, step: int, evaluate: Evaluate, **given: Any
    ) -> Records | None:
        """The records, written; None where the step is only taken back."""
        meter = self._meter
        if observed.joining:  # ranks that have run out of data take part in nothing
            return meter.write(meter.measure(Step(step, lr=0.0, failed=JOINING), _no_loss))
        observed.find_error()
        if self._frozen is not None:
            observed.check_undoable(step)
        measures = self._measures(step)
        with observed.replaying(
            evaluate,
            self._losses,
            eval_mode=self._mode == "eval",
            frozen=self._frozen is not None,
            watched=measures and meter.watches,
        ) as (loss_at, losses_at):
            if not measures:
                return None
            seen = observed.agree(step, trained=self._mode == "train", **given)
            seen = meter.with_second_moments(seen, observed.second_moments, collective_device())

            def part_loss_at(part: str, learning_rate: float) -> tuple[float, int]:
                return loss_at(learning_rate / seen.lr, part)

            records = meter.measure(
                seen,
                lambda learning_rate: loss_at(learning_rate / seen.lr),
                self._losses,
                lambda learning_rate, names: losses_at(learning_rate / seen.lr, names),
                part_loss_at if self._settings.due_parts(step) else None,
            )
            train = records.train
            if train.evaluations and (reason := observed.check_draws(seen, loss_at)) is not None:
                records = records.with_train(train.without_number(reason))
        return meter.write(records, observed.changes)

    def _count(self, step: int) -> int | None:
        """Take note of a step's number, and say so once where no number can be due."""
        previous, self._previous = self._previous, step
        if previous is None or step <= previous:
            return previous
        steady, self._stride = self._stride == step - previous, step - previous
        every = self._settings.every
        if every and steady and step % math.gcd(self._stride, every) and not self._told:
            self._told = True
            self._warn(
                f"critical sharpness: every={every} divides none of the numbers {previous}, "
                f"{step}, {step + self._stride}, … that after_step is given, so that nothing will "
                "be measured; give the number of the optimizer step, or another `every`"
            )
        return previous

    def _measures(self, step: int) -> bool:
        return self._meter.due(step) and (self._frozen is None or step > self._frozen)

    def _observes(self, step: int) -> bool:
        return self._frozen is not None or self._meter.due(step)

    def _observe(self) -> ObservedStep:
        return ObservedStep(
            self._model,
            self._optimizers,
            keep=self._keep,
            offload=self._offload,
            parts=self._parts,
        )


#: Why nothing is measured under DDP's join.
JOINING = (
    "DDP.join(): ranks that have run out of data no longer take part in what all ranks have to do "
    "together; give all ranks as many batches, and leave join out"
)


def _no_loss(learning_rate: float) -> tuple[float, int]:
    raise AssertionError(f"a failed step has no loss at {learning_rate}")
