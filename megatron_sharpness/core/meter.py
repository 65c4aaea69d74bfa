"""One measurement from end to end, for any adapter: the loss at points of a line in, records out.

The meter knows no framework and no ranks. An adapter hands it a
:class:`~megatron_sharpness.core.step.Step` and functions for the losses along the step's update;
every rank runs the same meter on the same numbers and so takes the same decisions.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch

from megatron_sharpness.core.alarm import Alarm, AlarmBell
from megatron_sharpness.core.checks import Ending, WrongLoss, disturbed
from megatron_sharpness.core.errors import ProbeError, reason_of
from megatron_sharpness.core.measurement import TRAIN, Measurement, Records
from megatron_sharpness.core.search import (
    SearchResult,
    find_critical_lr,
    find_critical_lrs,
    first_probe,
)
from megatron_sharpness.core.second_moments import SecondMoments, Source
from megatron_sharpness.core.self_test import SelfTest
from megatron_sharpness.core.settings import Settings
from megatron_sharpness.core.step import LossAt, LossesAt, PartLossAt, Step

#: How far the update of a part is followed, in learning rates of the step or in η_c of the whole,
#: whichever is larger: where nothing rises up to there, the part limits nothing. Weights before a
#: normalization may grow without end, and in fp32 what is found then is rounding.
FARTHEST = 1000.0


class Sink(Protocol):
    """Where records go."""

    def write(self, measurement: Measurement) -> None: ...


@dataclass
class Meter:
    """Measures steps and remembers where the last search ended.

    Attributes:
        guesses: η_c last found, where the next search starts, by name of the data.
        test: what the run has shown of its losses.
        bell: the alarm.
        moments: what measures the optimizer's second moments, where that is asked for.
        ended: why nothing more is measured, if so.

    Args:
        settings: what to measure with.
        sinks: where records go; empty on ranks that write nothing.
        warn: tells the user what a record cannot; does nothing on ranks that write nothing.
        self_tested: modes of the run that nobody could test. A number is believed once a watched
            measurement of this process has changed nothing and replayed the training loss exactly,
            and as long as each does the latter; if one does not, nothing more is measured.
        confirm: told of a measurement of the step's own batch, with what evaluates its loss.
    """

    settings: Settings
    sinks: Sequence[Sink] = ()
    warn: Callable[[str], object] = warnings.warn
    self_tested: Sequence[str] = ()
    confirm: Callable[[Step, Measurement, LossAt], object] | None = None
    guesses: dict[str, float] = field(default_factory=dict, init=False)
    test: SelfTest = field(default_factory=SelfTest, init=False)
    ended: str | None = field(default=None, init=False)
    bell: AlarmBell = field(init=False)
    moments: SecondMoments | None = field(default=None, init=False)
    _watched: bool = field(default=False, init=False)
    _passed: bool = field(default=False, init=False)
    _silent: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.bell = AlarmBell(self.settings.alarm, self.settings.alarm_after)
        if self.settings.adam_snr:
            self.moments = SecondMoments(lambda text: self.warn(text))  # which may be set later

    def due(self, iteration: int) -> bool:
        """Whether ``iteration`` is to be measured: more of them are while the alarm rings."""
        return self.settings.due(iteration, alarmed=self.bell.rings and self.ended is None)

    @property
    def watches(self) -> bool:
        """Whether the coming measurement is to be watched: the first one, or each."""
        first = not self._watched or (bool(self.self_tested) and not self._passed)
        return self.ended is None and (self.settings.watch == "always" or first)

    def with_second_moments(
        self, step: Step, sources: Callable[[], Sequence[Source]], device: torch.device
    ) -> Step:
        """The step with what its optimizers' second moments say, where that is asked for.
        Collective.

        Args:
            step: that has been made.
            sources: gives where they lie; on every rank as many.
            device: where the process group reduces.
        """
        if self.moments is None or self.ended is not None or not step.has_moved:
            return step
        return replace(step, adam_snr=self.moments.measure(sources, device))

    def measure(
        self,
        step: Step,
        loss_at: LossAt,
        others: Iterable[str] = (),
        losses_at: LossesAt | None = None,
        part_loss_at: PartLossAt | None = None,
    ) -> Records:
        """Find η_c of ``step``, then η_c^P of its parts, and then η_c^{1→2} of losses on other data
        along its update.

        The first measurement of a run tests what is evaluated, as
        :mod:`megatron_sharpness.core.self_test` says. From then on the training loss, where it is
        known, is L(θ), and costs nothing. On other data (Def. 4.1) L(θ) is an evaluation, and the
        slope is not known; the searches share the moves along the line as
        :func:`~megatron_sharpness.core.search.find_critical_lrs` says.

        Args:
            step: the step that has been made.
            loss_at: what evaluates the loss of its own batch.
            others: names of the losses on other data, each the ``batch`` of its record.
            losses_at: what evaluates some of them at one η.
            part_loss_at: what evaluates the loss of the step's own batch along the update of a
                part alone, by its name.

        Returns:
            The records, for :meth:`write`. The ``seconds`` of those on other data are of all
            together.
        """
        step = self._with_slope_that_agrees(step)
        train = self._unmeasured(step, TRAIN) or self._measured(step, loss_at)
        train = replace(train, seconds=time.perf_counter() - step.started)
        if self.confirm is not None and train.evaluations:
            self.confirm(step, train, loss_at)
        measured = [train]
        if part_loss_at is not None:
            measured += [
                self._of_part(part, train, partial(part_loss_at, part.part)) for part in step.parts
            ]
        if losses_at is not None and (names := list(others)):
            measured += self._on_other_data(self._with_slope_that_agrees(step), names, losses_at)
        return Records(measured)

    def write(self, records: Records, changed: Sequence[str] | None = None) -> Records:
        """Write the records of one step to the sinks.

        Args:
            records: what was measured.
            changed: what a watch has found to be changed by the measurement; None without one. If
                it is anything, the records are without a number and nothing more is measured.

        Returns:
            The records as they were written.

        Raises:
            ProbeError: a measurement failed and ``settings.on_error`` is ``raise``. The records
                have been written by then.
        """
        self._watched |= changed is not None and any(r.evaluations for r in records.values())
        if changed:
            self.ended = disturbed(changed)
            records = records.without_numbers(self.ended)
        elif self.self_tested:
            records = self._self_tested(records, watched=changed is not None)
        for record in records.values():
            self._tell("write", record)
            if record.name == TRAIN and (alarm := self.bell.observe(record)) is not None:
                self._raise_alarm(alarm)
        failed = next((r for r in records.values() if r.status == "failed"), None)
        if failed is not None and self.settings.on_error == "raise":
            raise ProbeError(failed.reason)
        return records

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to measure what an uninterrupted one does, as plain numbers.

        What is there by name is a list of pairs: ``torch.distributed.checkpoint`` reads of a
        dictionary but the keys that it has already.
        """
        return {
            key: [list(pair) for pair in value.items()] if isinstance(value, dict) else value
            for key, value in {"guesses": self.guesses, **asdict(self.test)}.items()
        } | {"alarm": self.bell.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; entries that this version does not know are ignored."""
        known = {entry.name for entry in fields(SelfTest)}
        self.bell.load_state_dict(state.get("alarm", []))
        read: dict[str, Any] = {
            key: dict(value) if isinstance(value, list) else value
            for key, value in state.items()
            if key in {"guesses", *known}
        }
        self.guesses = read.pop("guesses", {})
        self.test = SelfTest(**read)

    def _measured(self, step: Step, loss_at: LossAt) -> Measurement:
        record = step.blank(TRAIN)
        tokens: int | None = None

        def loss_alone(eta: float) -> float:
            nonlocal tokens
            loss, tokens = loss_at(eta)
            return loss

        try:
            loss = self._loss_at_start(step, loss_alone)
            noise = self.test.noise(step, TRAIN, loss)
            record = replace(record, loss=loss, noise=noise, replay_error=self.test.replay_error)
            guess = self._guess(step, TRAIN)
            search = self._search(step, loss_alone, loss=loss, guess=guess, noise=noise)
            record = replace(record, tokens=tokens, evaluations=search.evaluations)
            self.test.check_moves(step, search, loss, noise)
            read = step.read(record, search)
            found = self.test.check_slope(step, read, search, loss_alone, self.warn)
        except Exception as error:  # whatever it is, the run goes on
            reason = reason_of(error)
            if isinstance(error, Ending):
                self.ended = reason
            return replace(record, reason=reason, replay_error=self.test.replay_error)
        self._remember(found)
        return found

    def _of_part(self, step: Step, train: Measurement, loss_at: LossAt) -> Measurement:
        """:meth:`_measured` along the update of a part, once the whole was measured: ``train``."""
        started = time.perf_counter()
        record = replace(step.blank(TRAIN), loss=train.loss, tokens=train.tokens)
        if not train.evaluations or train.loss is None or train.status == "failed":
            return replace(record, status=train.status, reason=train.reason)
        if not step.update_norm:
            return replace(record, status="zero_lr", reason="the step has not moved this part")
        step = self._with_slope_that_agrees(step)
        noise = self.test.noise(step, TRAIN, train.loss)
        record = replace(record, noise=noise)
        guess = self.guesses.get(record.name) or self._guess(step, TRAIN)
        try:
            search = self._search(
                step,
                lambda eta: loss_at(eta)[0],
                loss=train.loss,
                guess=guess,
                noise=noise,
                farthest=FARTHEST * max(step.lr, train.critical_lr or 0.0),
            )
        except Exception as error:  # whatever it is, the run goes on
            return replace(record, reason=reason_of(error))
        record = step.read(replace(record, evaluations=search.evaluations), search)
        self._remember(record)
        if record.status == "no_upper" and record.critical_lr_lower is not None:
            self.guesses[record.name] = record.critical_lr_lower  # where one look will be enough
        return replace(record, seconds=time.perf_counter() - started)

    def _search(
        self,
        step: Step,
        loss_at: Callable[[float], float],
        *,
        loss: float,
        guess: float,
        noise: float,
        farthest: float = math.inf,
    ) -> SearchResult:
        return find_critical_lr(
            loss_at,
            loss=loss,
            guess=guess,
            slope=step.slope,
            noise=noise,
            resolution=step.resolution,
            tolerance=self.settings.tolerance,
            method=self.settings.method,
            max_evaluations=self.settings.max_evaluations,
            farthest=farthest,
        )

    def _loss_at_start(self, step: Step, loss_at: Callable[[float], float]) -> float:
        if self.self_tested:
            return self.test.exact_loss_at_start(step, loss_at, self.self_tested)
        return self.test.loss_at_start(step, loss_at, self.warn)

    def _self_tested(self, records: Records, *, watched: bool) -> Records:
        """The records with the modes that have passed their test."""
        train = records.train
        if train.status == "failed" or not train.evaluations:
            return records
        modes = ", ".join(self.self_tested)
        if watched and not self._passed:
            self._passed = True
            self.warn(
                f"critical sharpness: self-tested in this run: {modes}. At iteration "
                f"{train.iteration} the measurement has changed nothing that training reads, and "
                f"the replayed loss is off by {train.replay_error:.2g} nat."
            )
        if not self._passed:
            return records
        return Records(replace(r, self_tested=modes) for r in records.values())

    def _on_other_data(
        self, step: Step, names: Sequence[str], losses_at: LossesAt
    ) -> list[Measurement]:
        step = replace(step, started=time.perf_counter())
        records = [self._unmeasured(step, name) for name in names]
        found = [r for r in records if r is not None] or self._measured_others(
            step, names, losses_at
        )
        seconds = time.perf_counter() - step.started
        return [replace(record, seconds=seconds) for record in found]

    def _measured_others(
        self, step: Step, names: Sequence[str], losses_at: LossesAt
    ) -> list[Measurement]:
        """:meth:`_measured` of losses on other data."""
        records = {name: step.blank(name) for name in names}
        try:
            start = losses_at(0.0, names)
            for name, (loss, tokens) in start.items():
                records[name] = replace(records[name], loss=loss, tokens=tokens)
                try:
                    self.test.check_repeats(step, name, loss, partial(_loss_of, losses_at, name))
                except WrongLoss as wrong:
                    records[name] = replace(records[name], reason=str(wrong))
            losses = {name: start[name][0] for name in names if records[name].reason is None}
            noises = {name: self.test.noise(step, name, loss) for name, loss in losses.items()}
            searches = find_critical_lrs(
                lambda eta, some: {name: loss for name, (loss, _) in losses_at(eta, some).items()},
                losses=losses,
                guesses={
                    name: first_probe(self._guess(step, name), step.slope, noise)
                    for name, noise in noises.items()
                },
                noises=noises,
                resolution=step.resolution,
                tolerance=self.settings.tolerance,
                method=self.settings.method,
                max_evaluations=self.settings.max_evaluations,
            )
        except Exception as error:  # whatever it is, the run goes on
            return [replace(record, reason=reason_of(error)) for record in records.values()]
        for name, search in searches.items():
            record = replace(records[name], noise=noises[name], evaluations=search.evaluations)
            records[name] = step.read(record, search)
            self._remember(records[name])
        return list(records.values())

    def _with_slope_that_agrees(self, step: Step) -> Step:
        return replace(step, slope=None) if self.test.slope_agrees is False else step

    def _guess(self, step: Step, name: str) -> float:
        """Where the search begins."""
        return self.guesses.get(name) or self.settings.initial_guess or step.lr

    def _remember(self, record: Measurement) -> None:
        """Where the next search begins."""
        if record.critical_lr is not None:
            self.guesses[record.name] = record.critical_lr

    def _unmeasured(self, step: Step, name: str) -> Measurement | None:
        """The record where there is no update to go along, or no more measuring."""
        record = step.blank(name)
        if (reason := self.ended or step.failed) is not None:
            return replace(record, reason=reason)
        if step.skipped is not None:
            return replace(record, status="skipped_step", reason=step.skipped)
        if step.lr == 0.0:
            return replace(record, status="zero_lr")
        if not step.is_finite:
            reason = "the gradient or the update is not finite"
            return replace(record, status="non_finite", reason=reason)
        return None

    def _raise_alarm(self, alarm: Alarm) -> None:
        self.warn(str(alarm))
        self._tell("alarm", alarm)
        if self.settings.on_alarm is None:
            return
        try:
            self.settings.on_alarm(alarm)
        except Exception as error:
            if self.settings.on_error == "raise":
                raise
            self.warn(f"critical sharpness: on_alarm has failed ({reason_of(error)})")

    def _tell(self, method: Literal["write", "alarm"], what: Measurement | Alarm) -> None:
        """Hand it to all sinks; not every one has a place for alarms."""
        for sink in self.sinks:
            try:
                if hasattr(sink, method):
                    getattr(sink, method)(what)
            except Exception as error:
                if self.settings.on_error == "raise":
                    raise
                if id(sink) not in self._silent:
                    self._silent.add(id(sink))
                    self.warn(
                        f"critical sharpness: {type(sink).__name__} could not write iteration "
                        f"{what.iteration} ({reason_of(error)}); this is said once"
                    )


def _loss_of(losses_at: LossesAt, name: str) -> float:
    """L(θ) of one of the losses."""
    return losses_at(0.0, [name])[name][0]
