"""How often the verdict of a report is right, and where η/η_c lies at the best learning rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from experiments.learning_rate.prediction import Sweep, best
from experiments.learning_rate.run import Case, Training
from megatron_sharpness.report.phases import stable_phase
from megatron_sharpness.report.verdict import (
    ABOVE,
    AT_THE_EDGE,
    DIVERGED,
    FAR_TOO_LOW,
    HIGH,
    LEAST_RATIO,
    LOW,
    TOO_FEW,
    TOO_HIGH,
    USUAL,
    verdict_of,
)

#: What the final losses say: within ``CLOSE`` of the lowest, or not, and on which side of it.
FINE, TOO_LOW_IS, TOO_HIGH_IS = "within 10 %", "too low", "too high"
TRUTHS = (TOO_LOW_IS, FINE, TOO_HIGH_IS)
CLOSE = 1.1
#: The truth that each verdict claims.
CLAIMED = {
    FAR_TOO_LOW: TOO_LOW_IS,
    LOW: TOO_LOW_IS,
    USUAL: FINE,
    HIGH: FINE,
    TOO_HIGH: TOO_HIGH_IS,
    AT_THE_EDGE: TOO_HIGH_IS,
    ABOVE: TOO_HIGH_IS,
    DIVERGED: TOO_HIGH_IS,
}
VERDICTS = (*LEAST_RATIO, DIVERGED, TOO_FEW)


def truths(sweep: Sweep) -> list[str]:
    """Of each training, by its final loss."""
    lowest = min(sweep, key=lambda each: each.final)
    return [
        FINE
        if each.final <= CLOSE * lowest.final
        else TOO_LOW_IS
        if each.peak < lowest.peak
        else TOO_HIGH_IS
        for each in sweep
    ]


def confusion(known: Iterable[Sweep]) -> Counter[tuple[str, str]]:
    """How many trainings have a verdict and a truth."""
    return Counter(
        (verdict_of(each.run).name, truth)
        for sweep in known
        for each, truth in zip(sweep, truths(sweep), strict=True)
    )


def right(counted: Counter[tuple[str, str]], verdicts: Iterable[str] = CLAIMED) -> float:
    """The share of the trainings with such verdicts for which they are true."""
    chosen = {pair: number for pair, number in counted.items() if pair[0] in set(verdicts)}
    good = sum(number for (name, truth), number in chosen.items() if CLAIMED[name] == truth)
    return good / sum(chosen.values())


def at_best(sweep: Sweep) -> float:
    """Median η/η_c in the stable phase of the training next to the best learning rate."""
    rate = best(sweep)
    nearest = min(sweep, key=lambda each: abs(math.log(each.peak / rate)))
    return level(nearest)


def level(training: Training) -> float:
    """Median η/η_c in the stable phase."""
    phase = stable_phase(training.run)
    return math.nan if phase is None else phase.median


def by_optimizer_and_batch(known: dict[Case, Sweep]) -> dict[tuple[str, int], list[Sweep]]:
    """All sweeps with an optimizer and a number of sequences."""
    found: dict[tuple[str, int], list[Sweep]] = {}
    for case, sweep in known.items():
        found.setdefault((case.optimizer, case.sequences), []).append(sweep)
    return dict(sorted(found.items()))


def spread(values: Iterable[float]) -> float:
    """Largest over smallest."""
    those = list(values)
    return max(those) / min(those)
