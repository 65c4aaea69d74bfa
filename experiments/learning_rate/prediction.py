"""Which learning rate is best, as three short trainings tell it, and as the whole sweep does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.learning_rate.run import CHOSEN_ON, EVERY, LOWEST, STEPS, WARMUP, Case, Training
from megatron_sharpness.report.phases import ratio_of

#: A short training is the first tenth of a whole one, and η/η_c is read after its warm-up.
SHORT = STEPS // 10
#: Its learning rates, in decades above the lowest of the sweep.
DECADES = (1, 2, 3)
#: What a prediction may be off by.
FACTOR = 2.0

Sweep = Sequence[Training]
#: What predicts, from three trainings of which it may see the first ``SHORT`` steps.
Predictor = Callable[[Sweep], float]


def sweeps(trainings: Iterable[Training]) -> dict[Case, list[Training]]:
    """Those of a case, by learning rate; cases that were not trained at all rates are left out."""
    found: dict[Case, list[Training]] = {}
    for training in trainings:
        found.setdefault(training.case, []).append(training)
    return {
        case: sorted(those, key=lambda training: training.peak)
        for case, those in found.items()
        if len(those) == len(case.rates)
    }


def best(sweep: Sweep) -> float:
    """The learning rate of the lowest final loss, by a parabola through the three around it."""
    return _lowest([(each.peak, each.final) for each in sweep])


def short(sweep: Sweep) -> list[Training]:
    """The three that are known for their first steps."""
    lowest = LOWEST[sweep[0].case.optimizer]
    wanted = [10.0 ** (lowest + decades) for decades in DECADES]
    return [min(sweep, key=lambda each: abs(math.log(each.peak / rate))) for rate in wanted]


def ratio(training: Training, first: int = WARMUP, last: int = SHORT) -> float:
    """Median η/η_c between two steps; infinite where the loss was not finite by then."""
    records = training.run.records[first // EVERY : last // EVERY]
    ratios = [found for record in records if (found := ratio_of(record)) is not None]
    if training.steps < last or not ratios:
        return math.inf
    return float(np.median(ratios))


def by_ratio(target: float) -> Predictor:
    """η where η/η_c meets ``target``, on the power of η that fits the three best."""

    def predict(trainings: Sweep) -> float:
        points = [(each.peak, ratio(each)) for each in trainings]
        finite = [(rate, seen) for rate, seen in points if 0.0 < seen < math.inf]
        if len(finite) < 2:
            return math.nan
        rates, ratios = np.log(finite).T
        power, level = np.polyfit(rates, ratios, 1)
        return float(np.exp((math.log(target) - level) / power))

    return predict


def by_loss(trainings: Sweep) -> float:
    """η of the lowest loss at the end of the short trainings."""
    last = slice((SHORT - WARMUP) // EVERY, SHORT // EVERY)
    losses = []
    for each in trainings:
        seen = [loss for loss, _ in each.measured[last] if loss is not None]
        losses.append(float(np.mean(seen)) if each.steps >= SHORT else math.inf)
    return _lowest([(each.peak, loss) for each, loss in zip(trainings, losses, strict=True)])


def by_optimizer(known: dict[Case, list[Training]]) -> Predictor:
    """The rate that was best, in the geometric mean, for the optimizer elsewhere."""
    rates = {
        optimizer: math.exp(
            np.mean([math.log(best(s)) for case, s in known.items() if case.optimizer == optimizer])
        )
        for optimizer in LOWEST
    }
    return lambda trainings: rates[trainings[0].case.optimizer]


def regret(sweep: Sweep, rate: float) -> float:
    """The final loss at a learning rate over the lowest, interpolated in log rate; infinite beyond
    the rates of the sweep, and where the loss was not finite."""
    rates = [math.log(each.peak) for each in sweep]
    if not rates[0] <= math.log(rate) <= rates[-1]:
        return math.inf
    losses = [each.final for each in sweep]
    return float(np.interp(math.log(rate), rates, losses)) / min(losses)


@dataclass(frozen=True)
class Outcome:
    """How a predictor did on sweeps.

    Attributes:
        errors: predicted over best learning rate, by case.
        regrets: final loss there over the lowest, by case.
    """

    errors: dict[Case, float]
    regrets: dict[Case, float]

    @property
    def within(self) -> int:
        """How many are off by less than ``FACTOR``."""
        return sum(1.0 / FACTOR < error < FACTOR for error in self.errors.values())

    @property
    def fine(self) -> int:
        """How many end within 10 % of the lowest loss."""
        return sum(regret <= 1.1 for regret in self.regrets.values())

    @property
    def typical(self) -> float:
        """The factor that half of them are off by less than."""
        return float(np.exp(np.median([abs(math.log(e)) for e in self.errors.values()])))


def outcome(predict: Predictor, known: dict[Case, list[Training]]) -> Outcome:
    """The predictor's on sweeps; NaN, where it says nothing, is a miss."""
    rates = {
        case: rate if math.isfinite(rate := predict(short(sweep))) and rate > 0.0 else math.inf
        for case, sweep in known.items()
    }
    return Outcome(
        {case: rates[case] / best(sweep) for case, sweep in known.items()},
        {case: regret(sweep, rates[case]) for case, sweep in known.items()},
    )


def chosen_target(known: dict[Case, list[Training]]) -> float:
    """The η/η_c whose prediction is right most often, and then nearest, on sweeps to choose on."""

    def badness(target: float) -> tuple[int, float]:
        found = outcome(by_ratio(target), known)
        return -found.within, found.typical

    return min((float(f"{t:.2g}") for t in np.geomspace(0.02, 1.0, 40)), key=badness)


def apart(known: dict[Case, list[Training]]) -> tuple[dict[Case, list[Training]], ...]:
    """Those that rules were chosen on, and those that they are tried on."""
    on = {case: sweep for case, sweep in known.items() if case in CHOSEN_ON}
    return on, {case: sweep for case, sweep in known.items() if case not in CHOSEN_ON}


def _lowest(points: Iterable[tuple[float, float]]) -> float:
    """Where the lowest of (rate, loss) lies, by a parabola in log rate through it and its
    neighbours; the point itself at an end."""
    finite = [(math.log(rate), loss) for rate, loss in points if math.isfinite(loss)]
    at = min(range(len(finite)), key=lambda i: finite[i][1])
    if not 0 < at < len(finite) - 1:
        return math.exp(finite[at][0])
    a, b, _ = np.polyfit(*zip(*finite[at - 1 : at + 2], strict=True), 2)
    return float(np.exp(-b / (2.0 * a)))
