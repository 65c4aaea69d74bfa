"""One measurement from end to end, for any adapter: the loss at points of a line in, a record out.

The meter knows no framework and no ranks. An adapter hands it a :class:`Step` and a function for
the loss along the step's update; every rank runs the same meter on the same numbers and so takes
the same decisions.
"""

from __future__ import annotations

import math
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Protocol, get_args

from megatron_sharpness.errors import SettingError
from megatron_sharpness.measurement import (
    NOISE_LIMIT,
    TRAIN,
    Measurement,
    Status,
    edge_of_stability,
    edge_of_stability_preconditioned,
)
from megatron_sharpness.search import (
    Method,
    Probe,
    SearchResult,
    estimate_directional_sharpness,
    find_critical_lr,
    find_critical_lrs,
    predict_critical_lr,
)

#: L(θ) of the training pass and its replay agree to this, relatively, where nothing is wrong: they
#: differ in the order and precision of the sum over micro-batches alone.
SELF_TEST_TOLERANCE = 2e-6

#: Displacements, in units of the learning rate, at which the loss is still linear: what it deviates
#: there from L(θ) − ηs is noise, of the device or of rounding the weights.
NOISE_DISPLACEMENTS = (2.0**-10, 2.0**-9)


class Sink(Protocol):
    """Where records go."""

    def write(self, measurement: Measurement) -> None: ...


class ProbeError(RuntimeError):
    """A loss could not be evaluated. Adapters raise it on all ranks together."""


@dataclass(frozen=True)
class Settings:
    """What to measure with.

    Attributes:
        every: interval in iterations; 0 is off.
        method: line search: ``certified``, ``point`` or the paper's ``bisection``.
        tolerance: width |1 − lower/upper| of the bracket to reach, or largest uncertainty of an
            estimate, in (0, 1).
        initial_guess: learning rate at which the very first search starts; the step's own if None.
        max_evaluations: most forward passes that one search may spend.
        on_error: what a failed measurement does to the run.

    Raises:
        SettingError: a value cannot be used; the message names it, the reason and the remedy.
    """

    every: int = 100
    method: Method = "certified"
    tolerance: float = 1 / 16
    initial_guess: float | None = None
    max_evaluations: int = 40
    on_error: Literal["warn", "raise"] = "warn"

    def __post_init__(self) -> None:
        if self.every < 0:
            raise SettingError(
                "every", self.every, "an interval is positive; give 100, or 0 to switch it off"
            )
        if self.method not in get_args(Method):
            raise SettingError(
                "method",
                self.method,
                f"no such line search; give one of {', '.join(map(repr, get_args(Method)))}",
            )
        if not 0.0 < self.tolerance < 1.0:
            raise SettingError(
                "tolerance",
                self.tolerance,
                "a relative width lies between 0 and 1; give 0.0625, the default, or leave it out",
            )
        if self.initial_guess is not None and not 0.0 < self.initial_guess < math.inf:
            raise SettingError(
                "initial_guess",
                self.initial_guess,
                "a learning rate to start from is positive and finite; leave it out to start from "
                "the step's own",
            )
        if self.max_evaluations < 1:
            raise SettingError(
                "max_evaluations",
                self.max_evaluations,
                "a search needs forward passes; give 40, the default, or leave it out",
            )
        if self.on_error not in ("warn", "raise"):
            raise SettingError("on_error", self.on_error, "give 'warn', to train on, or 'raise'")

    def due(self, iteration: int) -> bool:
        """Whether the interval divides ``iteration``."""
        return self.every > 0 and iteration % self.every == 0


@dataclass(frozen=True)
class Step:
    """An optimizer step that has been made, and whose update is to be measured.

    Attributes:
        training_loss: L(θ) of the training pass, or None where it is not the loss that the probes
            evaluate (other batch, other mode) and has to be evaluated too.
        skipped: the optimizer did not step.
        failed: why the step could not be observed, if so.
        started: ``time.perf_counter()`` when the measurement began.

    The other fields are those of :class:`~megatron_sharpness.measurement.Measurement`.
    """

    iteration: int
    lr: float
    consumed_samples: int | None = None
    weight_decay: float = 0.0
    beta1: float | None = None
    training_loss: float | None = None
    slope: float | None = None
    update_norm: float | None = None
    tokens: int | None = None
    skipped: bool = False
    failed: str | None = None
    started: float = field(default_factory=time.perf_counter)


@dataclass
class MeterState:
    """What a resumed run needs in order to measure what an uninterrupted one does.

    Attributes:
        guess: η_c last found, where the next search starts.
        replay_is_exact: whether the replayed L(θ) was seen to equal the training loss; None before
            the first measurement.
        noise: root-mean-square error of a loss in nats; None before the first measurement.
        measurements: measurements so far.
        guesses: ``guess`` of every loss on other data, by name.
    """

    guess: float | None = None
    replay_is_exact: bool | None = None
    noise: float | None = None
    measurements: int = 0
    guesses: dict[str, float] = field(default_factory=dict)


#: η and the names of losses on other data ↦ for each its L(θ − ηΔθ) and number of tokens, the same
#: numbers on every rank. It raises :class:`ProbeError`, on all ranks, where there is no number.
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

    def measure(
        self,
        step: Step,
        loss_at: Callable[[float], float],
        change_at: Callable[[float], float] | None = None,
    ) -> Measurement:
        """Find η_c of ``step`` and write the record to the sinks.

        Args:
            step: the step that has been made.
            loss_at: η ↦ L(θ − ηΔθ), the same number on every rank. It may return NaN or Inf, and
                raises :class:`ProbeError`, on all ranks, where there is no number.
            change_at: η ↦ L(θ − ηΔθ) − L(θ) over a part of the batch, if the search is to be
                located with it: η_c is predicted from one such change, at the price of that part,
                and the search begins there. It does not count as an evaluation.

        Raises:
            ProbeError: the measurement failed and ``settings.on_error`` is ``raise``. The record
                has been written by then.
        """
        outcome = self._outcome(step, loss_at, change_at)
        self.state.measurements += 1
        known = {"loss": step.training_loss, "slope": step.slope, "tokens": step.tokens}
        return self._record(step, TRAIN, {**known, **outcome})

    def measure_others(
        self, step: Step, names: Iterable[str], losses_at: LossesAt
    ) -> dict[str, Measurement]:
        """Find η_c^{1→2} of losses on other data along the update of ``step`` (Def. 4.1).

        Call it after :meth:`measure`. L(θ) is an evaluation here, and the slope is not known. The
        searches share the moves along the line as
        :func:`~megatron_sharpness.search.find_critical_lrs` says.

        Args:
            step: the step that has been made.
            names: of the losses, each the ``batch`` of its record.
            losses_at: what evaluates some of them at one η.

        Returns:
            The records by name, written to the sinks. Their ``seconds`` are those of all together.

        Raises:
            ProbeError: a measurement failed and ``settings.on_error`` is ``raise``.
        """
        if not (names := list(names)):
            return {}
        step = replace(step, slope=None, started=time.perf_counter())
        outcomes = self._outcomes(step, names, losses_at)
        return {name: self._record(step, name, outcome) for name, outcome in outcomes.items()}

    def _record(self, step: Step, batch: str, outcome: dict[str, Any]) -> Measurement:
        """The record, written to the sinks."""
        measurement = Measurement(
            iteration=step.iteration,
            consumed_samples=step.consumed_samples,
            lr=step.lr,
            batch=batch,
            update_norm=step.update_norm,
            noise=self.state.noise,
            **outcome,
            seconds=time.perf_counter() - step.started,
        )
        for sink in self.sinks:
            try:
                sink.write(measurement)
            except Exception:
                if self.settings.on_error == "raise":
                    raise
                self.warn(
                    f"critical sharpness: {type(sink).__name__} could not write iteration "
                    f"{step.iteration}:\n{traceback.format_exc()}"
                )
        if measurement.status == "failed" and self.settings.on_error == "raise":
            raise ProbeError(measurement.reason)
        return measurement

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, for a checkpoint."""
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; entries that this version does not know are ignored."""
        known = {entry.name for entry in fields(MeterState)}
        self.state = MeterState(**{key: value for key, value in state.items() if key in known})

    def _outcome(
        self,
        step: Step,
        loss_at: Callable[[float], float],
        change_at: Callable[[float], float] | None,
    ) -> dict[str, Any]:
        """The fields of the record that the measurement itself determines."""
        if (ended := _ended_early(step)) is not None:
            return ended
        try:
            loss = self._loss_at_start(step, loss_at)
            search = find_critical_lr(
                loss_at,
                loss=loss,
                guess=self._guess(step, loss, change_at),
                slope=step.slope,
                tolerance=self.settings.tolerance,
                method=self.settings.method,
                max_evaluations=self.settings.max_evaluations,
            )
        except Exception as error:  # whatever it is, the run goes on
            return _failed(step, error)
        outcome = self._found(step, loss, search)
        self.state.guess = outcome.get("critical_lr", self.state.guess)
        return outcome

    def _outcomes(
        self, step: Step, names: Sequence[str], losses_at: LossesAt
    ) -> dict[str, dict[str, Any]]:
        """:meth:`_outcome` of losses on other data, by name."""
        if (ended := _ended_early(step)) is not None:
            return dict.fromkeys(names, ended)
        first = self.settings.initial_guess or step.lr
        try:
            start = losses_at(0.0, names)
            losses = {name: loss for name, (loss, _) in start.items()}
            searches = find_critical_lrs(
                lambda eta, some: {name: loss for name, (loss, _) in losses_at(eta, some).items()},
                losses=losses,
                guesses={name: self.state.guesses.get(name, first) for name in names},
                tolerance=self.settings.tolerance,
                method=self.settings.method,
                max_evaluations=self.settings.max_evaluations,
            )
        except Exception as error:  # whatever it is, the run goes on
            return dict.fromkeys(names, _failed(step, error))
        outcomes = {}
        for name, search in searches.items():
            outcomes[name] = self._found(step, losses[name], search) | {"tokens": start[name][1]}
            if (eta := outcomes[name].get("critical_lr")) is not None:
                self.state.guesses[name] = eta
        return outcomes

    def _guess(
        self, step: Step, loss: float, change_at: Callable[[float], float] | None
    ) -> float:
        """Where the search begins."""
        guess = self.state.guess or self.settings.initial_guess or step.lr
        if change_at is None or not math.isfinite(loss):
            return guess
        located = Probe(guess, loss + change_at(guess))
        return predict_critical_lr(loss, step.slope, located) or guess

    def _loss_at_start(self, step: Step, loss_at: Callable[[float], float]) -> float:
        """L(θ): the training loss where its replay is known to equal it, an evaluation elsewhere.

        The first measurement of a run is the self-test: it replays L(θ), compares, and probes the
        noise of the loss close to θ.
        """
        trained = step.training_loss
        if trained is not None and (self.state.replay_is_exact or not math.isfinite(trained)):
            return trained
        loss = loss_at(0.0)
        if self.state.noise is None and math.isfinite(loss):
            self.state.noise = _noise(step, loss, loss_at)
        if self.state.replay_is_exact is None and trained is not None:
            error = abs(loss - trained)
            self.state.replay_is_exact = error <= SELF_TEST_TOLERANCE * max(1.0, abs(trained))
            if self.state.replay_is_exact:
                return trained
            self.warn(
                f"critical sharpness: the replayed loss {loss!r} differs from the training loss "
                f"{trained!r} at iteration {step.iteration}. L(θ) is evaluated at each "
                "measurement from now on, at the cost of one forward pass. The cause is a forward "
                "pass that does not repeat: non-deterministic kernels, or state that it changes."
            )
        return loss

    def _found(self, step: Step, loss: float, search: SearchResult) -> dict[str, Any]:
        outcome: dict[str, Any] = {
            **_lines(step),
            "loss": loss,
            "status": search.status,
            "evaluations": search.evaluations,
            "non_monotone": search.non_monotone,
            "critical_lr_lower": search.lower,
            "critical_lr_upper": search.upper,
            "directional_sharpness": estimate_directional_sharpness(
                loss, step.slope, search.probes
            ),
        }
        if search.eta is None:
            return outcome
        fall = _fall(loss, search) if step.slope is None else step.slope * search.eta
        noise = self.state.noise / fall if self.state.noise and fall > 0.0 else 0.0
        if noise > NOISE_LIMIT:
            return outcome | _ended(
                "noise_limited",
                reason=f"the noise of the loss is {noise:.0%} of the predicted decrease s·η_c",
            )
        return outcome | {
            "critical_lr": search.eta,
            "critical_lr_error": None if search.error is None else math.hypot(search.error, noise),
            "critical_sharpness": 2.0 / search.eta,
            "lr_over_critical": step.lr / search.eta,
        }


def check_names(names: Iterable[str]) -> None:
    """Refuse names of losses that no tag can have.

    Raises:
        SettingError: names the name, the reason and the remedy.
    """
    for name in names:
        if name == TRAIN or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise SettingError(
                "losses",
                name,
                "a name is a tag's last part, and 'train' is the step's own batch; give one of "
                "letters, digits, '_', '.' and '-'",
            )


def _ended_early(step: Step) -> dict[str, Any] | None:
    """Where there is no update to go along."""
    if step.failed is not None:
        return _ended("failed", reason=step.failed)
    if step.skipped:
        return _ended("skipped_step")
    return _ended("zero_lr") if step.lr == 0.0 else None


def _failed(step: Step, error: Exception) -> dict[str, Any]:
    return _lines(step) | _ended("failed", reason=f"{type(error).__name__}: {error}")


def _lines(step: Step) -> dict[str, Any]:
    """The edges of stability of the step's learning rate."""
    lines = {"edge_of_stability": edge_of_stability(step.lr, step.weight_decay)}
    if step.beta1 is not None:
        lines["edge_of_stability_preconditioned"] = edge_of_stability_preconditioned(
            step.lr, step.weight_decay, step.beta1
        )
    return lines


def _fall(loss: float, search: SearchResult) -> float:
    """s·η_c of a loss whose slope s is not known, from the ends of the bracket.

    With h(η) = (L(θ − ηΔθ) − L(θ))/η = s(η/η_c − 1) of a quadratic loss it is η_c²·dh/dη.
    """
    losses = {probe.lr: probe.loss for probe in search.probes}
    lower, upper, eta = search.lower, search.upper, search.eta
    if lower is None or upper is None or eta is None or not math.isfinite(losses[upper]):
        return 0.0
    rise = (losses[upper] - loss) / upper - (losses[lower] - loss) / lower
    return rise / (upper - lower) * eta * eta


def _ended(status: Status, reason: str | None = None) -> dict[str, Any]:
    return {"status": status, "reason": reason}


def _noise(step: Step, loss: float, loss_at: Callable[[float], float]) -> float:
    """Root-mean-square deviation of L(θ − ηΔθ) from L(θ) − ηs at displacements next to none."""
    squares = []
    for displacement in NOISE_DISPLACEMENTS:
        eta = displacement * step.lr
        squares.append((loss_at(eta) - loss + eta * (step.slope or 0.0)) ** 2)
    return math.sqrt(sum(squares) / len(squares))
