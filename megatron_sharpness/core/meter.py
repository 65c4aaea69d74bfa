"""One measurement from end to end, for any adapter: the loss at points of a line in, a record out.

The meter knows no framework and no ranks. An adapter hands it a :class:`Step` and a function for
the loss along the step's update; every rank runs the same meter on the same numbers and so takes
the same decisions.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, Protocol

from megatron_sharpness.core.checks import (
    DISAGREES,
    ROUNDING,
    SAME,
    SAME_IN_16_BITS,
    SEEN,
    STILL,
    Unrepeatable,
    WrongLoss,
    agrees,
    disturbed,
    is_exact,
    repeat_error,
    replay_error,
    slope_ratio,
    still,
    wrong_slope,
)
from megatron_sharpness.core.directional import estimate_directional_sharpness
from megatron_sharpness.core.measurement import (
    TRAIN,
    Measurement,
    edge_of_stability,
    edge_of_stability_preconditioned,
)
from megatron_sharpness.core.search import (
    SearchResult,
    find_critical_lr,
    find_critical_lrs,
    first_probe,
)
from megatron_sharpness.core.settings import Settings


class Sink(Protocol):
    """Where records go."""

    def write(self, measurement: Measurement) -> None: ...


class ProbeError(RuntimeError):
    """A step could not be measured, or a loss not be evaluated; the message is the reason.

    Adapters raise it on all ranks together.
    """


def reason_of(error: Exception) -> str:
    """An error in a record: what is ours says all, others begin with their kind."""
    ours = isinstance(error, (WrongLoss, ProbeError))
    return str(error) if ours else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Step:
    """An optimizer step that has been made, and whose update is to be measured.

    Attributes:
        trained: whether the probes evaluate the loss that was differentiated: not in mode ``eval``.
        training_loss: L(θ) of the training pass, where it is known.
        noise: root-mean-square error of a loss from rounding the weights, in nats
            (:mod:`megatron_sharpness.core.products`).
        resolution: η below which rounded weights do not follow the line; 0 if none.
        coarse: whether the forward pass computes in 16 bits, or may do so.
        skipped: why the optimizer did not step, if so.
        failed: why the step could not be observed, if so.
        started: ``time.perf_counter()`` when the measurement began.

    The other fields are those of :class:`~megatron_sharpness.core.measurement.Measurement`.
    """

    iteration: int
    lr: float
    consumed_samples: int | None = None
    weight_decay: float = 0.0
    beta1: float | None = None
    trained: bool = True
    training_loss: float | None = None
    slope: float | None = None
    noise: float = 0.0
    resolution: float = 0.0
    update_norm: float | None = None
    coarse: bool = True
    skipped: str | None = None
    failed: str | None = None
    started: float = field(default_factory=time.perf_counter)


@dataclass
class MeterState:
    """What a resumed run needs in order to measure what an uninterrupted one does.

    Attributes:
        guesses: η_c last found, where the next search starts, by name of the data.
        repeat_errors: root-mean-square error of L(θ) evaluated again, in nats, by name of the data,
            as it was seen when that loss was first measured.
        replay_error: |replayed L(θ) − training loss|, in nats; None where none was compared.
        slope_agrees: whether next to θ the loss was seen to fall as the slope says; None before.
        measurements: measurements so far.
    """

    guesses: dict[str, float] = field(default_factory=dict)
    repeat_errors: dict[str, float] = field(default_factory=dict)
    replay_error: float | None = None
    slope_agrees: bool | None = None
    measurements: int = 0


#: η ↦ L(θ − ηΔθ) and the number of tokens, the same numbers on every rank. The loss may be NaN or
#: Inf; :class:`ProbeError` is raised, on all ranks, where there is no number.
LossAt = Callable[[float], tuple[float, int]]

#: The same of the losses on other data of these names.
LossesAt = Callable[[float, Sequence[str]], Mapping[str, tuple[float, int]]]


@dataclass
class Meter:
    """Measures steps and remembers where the last search ended.

    Args:
        settings: what to measure with.
        sinks: where records go; empty on ranks that write nothing.
        warn: tells the user what a record cannot; does nothing on ranks that write nothing.
        state: where to go on from.
    """

    settings: Settings
    sinks: Sequence[Sink] = ()
    warn: Callable[[str], object] = warnings.warn
    state: MeterState = field(default_factory=MeterState)
    #: Why nothing more is measured, if so.
    ended: str | None = field(default=None, init=False)
    _watched: bool = field(default=False, init=False)
    _silent: set[int] = field(default_factory=set, init=False)

    @property
    def watches(self) -> bool:
        """Whether the coming measurement is to be watched: the first one, or each."""
        return self.ended is None and (self.settings.watch == "always" or not self._watched)

    def measure(self, step: Step, loss_at: LossAt) -> Measurement:
        """Find η_c of ``step``. The record is for :meth:`write`.

        The first measurement of a run tests what is evaluated, as
        :mod:`megatron_sharpness.core.checks` says. From then on the training loss, where it is
        known, is L(θ), and costs nothing.
        """
        if self.state.slope_agrees is False:
            step = replace(step, slope=None)
        record = self._unmeasured(step, TRAIN)
        if record is None:
            record = self._measured(step, loss_at)
        self.state.measurements += 1
        return replace(record, seconds=time.perf_counter() - step.started)

    def measure_others(
        self, step: Step, names: Iterable[str], losses_at: LossesAt
    ) -> dict[str, Measurement]:
        """Find η_c^{1→2} of losses on other data along the update of ``step`` (Def. 4.1).

        Call it after :meth:`measure`. L(θ) is an evaluation here, and the slope is not known. The
        searches share the moves along the line as
        :func:`~megatron_sharpness.core.search.find_critical_lrs` says.

        Args:
            step: the step that has been made.
            names: of the losses, each the ``batch`` of its record.
            losses_at: what evaluates some of them at one η.

        Returns:
            The records by name, for :meth:`write`. Their ``seconds`` are those of all together.
        """
        if not (names := list(names)):
            return {}
        slope = step.slope if self.state.slope_agrees is not False else None
        step = replace(step, started=time.perf_counter(), slope=slope)
        unmeasured = {name: record for name in names if (record := self._unmeasured(step, name))}
        records = unmeasured or self._measured_others(step, names, losses_at)
        seconds = time.perf_counter() - step.started
        return {name: replace(records[name], seconds=seconds) for name in names}

    def write(
        self, records: Mapping[str, Measurement], changed: Sequence[str] | None = None
    ) -> dict[str, Measurement]:
        """Write the records of one step to the sinks.

        Args:
            records: by name of the data.
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
            records = {name: without_number(r, self.ended) for name, r in records.items()}
        for record in records.values():
            self._write(record)
        failed = next((r for r in records.values() if r.status == "failed"), None)
        if failed is not None and self.settings.on_error == "raise":
            raise ProbeError(failed.reason)
        return dict(records)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, for a checkpoint.

        What is there by name is a list of pairs: ``torch.distributed.checkpoint`` reads of a
        dictionary but the keys that it has already.
        """
        return {
            key: [list(pair) for pair in value.items()] if isinstance(value, dict) else value
            for key, value in asdict(self.state).items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; entries that this version does not know are ignored."""
        known = {entry.name for entry in fields(MeterState)}
        read: dict[str, Any] = {key: value for key, value in state.items() if key in known}
        named = {key: dict(value) for key, value in read.items() if isinstance(value, list)}
        self.state = MeterState(**{**read, **named})

    def _measured(self, step: Step, loss_at: LossAt) -> Measurement:
        record = _blank(step, TRAIN)
        tokens: int | None = None

        def loss_alone(eta: float) -> float:
            nonlocal tokens
            loss, tokens = loss_at(eta)
            return loss

        try:
            loss = self._loss_at_start(step, loss_alone)
            noise = self._noise(step, TRAIN, loss)
            record = replace(record, loss=loss, noise=noise, replay_error=self.state.replay_error)
            search = find_critical_lr(
                loss_alone,
                loss=loss,
                guess=self._guess(step, TRAIN),
                slope=step.slope,
                noise=noise,
                resolution=step.resolution,
                tolerance=self.settings.tolerance,
                method=self.settings.method,
                max_evaluations=self.settings.max_evaluations,
            )
            record = replace(record, tokens=tokens, evaluations=search.evaluations)
            if _is_still(step, search, loss, noise):
                raise WrongLoss(still(search.probes[0].loss))
            found = self._test_slope(step, _read(step, record, search), search, loss_alone)
        except Exception as error:  # whatever it is, the run goes on
            reason = reason_of(error)
            if isinstance(error, Unrepeatable):
                self.ended = reason
            return replace(record, reason=reason)
        self._remember(found)
        return found

    def _measured_others(
        self, step: Step, names: Sequence[str], losses_at: LossesAt
    ) -> dict[str, Measurement]:
        """:meth:`_measured` of losses on other data, by name."""
        records = {name: _blank(step, name) for name in names}
        try:
            start = losses_at(0.0, names)
            for name, (loss, tokens) in start.items():
                records[name] = replace(records[name], loss=loss, tokens=tokens)
                try:
                    self._test_repeat(step, name, loss, partial(_loss_of, losses_at, name))
                except WrongLoss as wrong:
                    records[name] = replace(records[name], reason=str(wrong))
            losses = {name: start[name][0] for name in names if records[name].reason is None}
            noises = {name: self._noise(step, name, loss) for name, loss in losses.items()}
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
            reason = reason_of(error)
            return {name: replace(record, reason=reason) for name, record in records.items()}
        for name, search in searches.items():
            record = replace(records[name], noise=noises[name], evaluations=search.evaluations)
            records[name] = _read(step, record, search)
            self._remember(records[name])
        return records

    def _guess(self, step: Step, name: str) -> float:
        """Where the search begins."""
        return self.state.guesses.get(name) or self.settings.initial_guess or step.lr

    def _remember(self, record: Measurement) -> None:
        """Where the next search begins."""
        if record.critical_lr is not None:
            self.state.guesses[record.batch] = record.critical_lr

    def _noise(self, step: Step, name: str, loss: float) -> float:
        """Root-mean-square error of one loss: of the weights' rounding, of kernels, and of fp32."""
        rounding = ROUNDING * loss if math.isfinite(loss) else 0.0
        return math.hypot(step.noise, self.state.repeat_errors.get(name, 0.0), rounding)

    def _loss_at_start(self, step: Step, loss_at: Callable[[float], float]) -> float:
        """L(θ): the training loss where its replay is known to equal it, an evaluation elsewhere.

        Raises:
            WrongLoss: it does not repeat, or is not the loss that was trained on.
        """
        state, trained = self.state, step.training_loss
        if trained is None:
            loss = loss_at(0.0)
            self._test_repeat(step, TRAIN, loss, lambda: loss_at(0.0))
            return loss
        if not math.isfinite(trained) or is_exact(state.replay_error, trained):
            return trained
        loss = loss_at(0.0)
        exact = is_exact(abs(loss - trained), trained)
        self._test_repeat(step, TRAIN, loss, lambda: trained if exact else loss_at(0.0))
        error = replay_error(loss, trained, _same(step))
        if state.replay_error is None and not exact:
            self.warn(
                f"critical sharpness: the replayed loss {loss!r} differs from the training loss "
                f"{trained!r} at iteration {step.iteration}. L(θ) is evaluated at each "
                "measurement from now on, at the cost of one forward pass. Likely causes: kernels "
                "that are not deterministic, or state that a forward pass changes; a loss that is "
                "not quite the one trained on, such as another batch's or one without a small term."
            )
        state.replay_error = error
        return trained if exact else loss

    def _test_repeat(self, step: Step, name: str, loss: float, again: Callable[[], float]) -> None:
        """Once for each loss: whether it repeats, and with which error.

        Raises:
            WrongLoss: it does not.
        """
        if name not in self.state.repeat_errors and math.isfinite(loss):
            self.state.repeat_errors[name] = repeat_error(loss, again, _same(step))

    def _test_slope(
        self,
        step: Step,
        record: Measurement,
        search: SearchResult,
        loss_at: Callable[[float], float],
    ) -> Measurement:
        """Once a run: whether next to θ the loss falls as the slope says.

        Where it does not and the loss is known to be right, the slope is of more than this loss,
        and not used.

        Raises:
            WrongLoss: it does not, and the loss may be the wrong one.
        """
        slope, state = step.slope, self.state
        if state.slope_agrees is not None or slope is None or not 0 < slope < math.inf:
            return record
        assert record.loss is not None and record.noise is not None
        nearest = max(SEEN * record.noise / slope, step.resolution)
        ratio = slope_ratio(
            record.loss, slope, nearest, search.probes, search.eta or search.upper, loss_at
        )
        if ratio is None:
            return record
        if step.trained:
            known = state.replay_error is not None and abs(ratio) >= STILL
        else:  # without dropout, say, it is a similar loss
            known = agrees(ratio, DISAGREES)
        if not agrees(ratio) and not known:
            raise WrongLoss(wrong_slope(ratio))
        state.slope_agrees = agrees(ratio)
        if state.slope_agrees:
            return record
        if step.trained:
            self.warn(
                f"critical sharpness: next to θ the loss falls {ratio:.3g} times as fast as the "
                "gradient says, so that the slope and the directional sharpness are left out of "
                "the records. η_c does not depend on it. Likely causes: gradients that were "
                "clipped, where the norm is not given, or losses that are in the gradient alone."
            )
        return replace(record, slope=None, directional_sharpness=None)

    def _write(self, record: Measurement) -> None:
        for sink in self.sinks:
            try:
                sink.write(record)
            except Exception as error:
                if self.settings.on_error == "raise":
                    raise
                if id(sink) not in self._silent:
                    self._silent.add(id(sink))
                    self.warn(
                        f"critical sharpness: {type(sink).__name__} could not write iteration "
                        f"{record.iteration} ({reason_of(error)}); this is said once"
                    )

    def _unmeasured(self, step: Step, name: str) -> Measurement | None:
        """The record where there is no update to go along, or no more measuring."""
        record = _blank(step, name)
        if (reason := self.ended or step.failed) is not None:
            return replace(record, reason=reason)
        if step.skipped is not None:
            return replace(record, status="skipped_step", reason=step.skipped)
        return replace(record, status="zero_lr") if step.lr == 0.0 else None


def _same(step: Step) -> float:
    return SAME_IN_16_BITS if step.coarse else SAME


def _loss_of(losses_at: LossesAt, name: str) -> float:
    """L(θ) of one of the losses."""
    return losses_at(0.0, [name])[name][0]


def _blank(step: Step, name: str) -> Measurement:
    """The record of a step before anything was evaluated."""
    record = Measurement(
        iteration=step.iteration,
        consumed_samples=step.consumed_samples,
        lr=step.lr,
        batch=name,
        status="failed",
        slope=step.slope if name == TRAIN else None,
        update_norm=step.update_norm,
    )
    if step.lr == 0.0:
        return record
    line = edge_of_stability(step.lr, step.weight_decay)
    if step.beta1 is None:
        return replace(record, edge_of_stability=line)
    other = edge_of_stability_preconditioned(step.lr, step.weight_decay, step.beta1)
    return replace(record, edge_of_stability=line, edge_of_stability_preconditioned=other)


def without_number(record: Measurement, reason: str) -> Measurement:
    """The record of a measurement that is not to be trusted, with what was known before it."""
    kept = ("iteration", "consumed_samples", "lr", "batch", "seconds", "evaluations")
    values = {name: getattr(record, name) for name in kept}
    return Measurement(**values, status="failed", reason=reason)


def _is_still(step: Step, search: SearchResult, loss: float, noise: float) -> bool:
    """Whether the loss is L(θ) wherever it was looked, though the slope promises to be seen."""
    if len(search.probes) < 3 or len({probe.loss for probe in search.probes}) > 1:
        return False
    if not is_exact(abs(search.probes[0].loss - loss), loss):
        return False
    farthest = max(probe.lr for probe in search.probes)
    seen = step.slope is None or abs(step.slope) * farthest > SEEN * noise
    return seen and math.isfinite(search.probes[0].loss) and farthest > step.resolution


def _read(step: Step, record: Measurement, search: SearchResult) -> Measurement:
    """The record with what the search has found."""
    assert record.loss is not None and record.noise is not None
    record = replace(
        record,
        status=search.status,
        reason=search.reason,
        non_monotone=search.non_monotone,
        critical_lr_lower=search.lower,
        critical_lr_upper=search.upper,
        directional_sharpness=estimate_directional_sharpness(
            record.loss,
            record.slope,
            search.probes,
            critical_lr=search.eta,
            noise=record.noise,
            resolution=step.resolution,
        ),
    )
    if search.status == "noise_limited":
        return replace(record, reason=_hidden(step, record))
    if search.eta is None:
        return record
    return replace(
        record,
        critical_lr=search.eta,
        critical_lr_error=search.error,
        critical_sharpness=2.0 / search.eta,
        lr_over_critical=step.lr / search.eta,
    )


def _hidden(step: Step, record: Measurement) -> str:
    """What hides η_c, and what would help."""
    assert record.noise is not None
    bracketed = record.critical_lr_lower is not None and record.critical_lr_upper is not None
    where = "as narrow a bracket as was asked for" if bracketed else "where it falls below L(θ)"
    if 2 * step.noise**2 > record.noise**2:
        source, remedy = "of rounding the weights to 16 bits", "fp32 weights in the forward pass"
    else:
        source, remedy = "of evaluating it again", "kernels that repeat, or fp32"
    return (
        f"the noise of the loss, {record.noise:.2g} nat {source}, hides {where}; what would help: "
        f"{remedy}, more tokens in the batch, a higher learning rate"
        + (", or a wider tolerance" if bracketed else "")
    )
