"""From a sweep over shares to the data mix that leaves room for the largest learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sharpness.core.errors import InputError

Array = NDArray[np.float64]

#: λ_c^{1→2} by share and by task, a number for each measured batch; ∞ where the loss rises at once.
Sweep = Mapping[float, Mapping[str, Sequence[float]]]

#: Draws of the bootstrap, and the part of them that an interval holds.
DRAWS, INTERVAL = 2000, 0.9

#: Batches from which on that says how sure a median is. An interval of the bootstrap ends at two of
#: the values measured, so that a count tells how often it holds the median, whatever the values'
#: distribution: with 20 and more in 85 to 92 % of cases, with 10 in 77 %, with 3 in 75 %.
ENOUGH = 20


@dataclass(frozen=True)
class Recommendation:
    """The share that leaves the most room, and how sure that is.

    Attributes:
        share: of those measured, the one with the smallest max over tasks of the median λ_c^{1→2}.
        critical_sharpness: that value.
        lr: η = 2/λ, the largest learning rate at which a step at this share raises no task's loss,
            with Adam's moments as they are at this point; 0 where there is none. A training at
            this learning rate may raise them.
        limits: the task whose loss rises first there.
        lr_interval: where ``lr`` lies in 90 % of bootstrap draws over the batches.
        votes: by share, the part of the draws that recommend it.
        crossing: the share at which the tasks that limit two neighbouring shares are equal, with
            η_c = 2/λ taken for linear between the two; None where the same task limits all.
        crossing_interval: of the crossing, in 90 % of the draws that have one; None if that are
            under half of them.
        batches: measured, at the share that has the fewest; under :data:`ENOUGH` of them intervals
            and votes say nothing.
    """

    share: float
    critical_sharpness: float
    lr: float
    limits: str
    lr_interval: tuple[float, float]
    votes: dict[float, float]
    crossing: float | None
    crossing_interval: tuple[float, float] | None
    batches: int


def recommend(sweep: Sweep, *, seed: int = 0) -> Recommendation:
    """The recommendation of a sweep (Section 5 and Fig. 6 of arXiv 2601.16979).

    The bootstrap draws the batches of each share anew, the same ones for all its tasks.

    Raises:
        InputError: no share, or a share without a measurement of every task.
    """
    shares = sorted(sweep)
    if not shares:
        raise InputError("the sweep has no share; measure at least one")
    tasks = list(sweep[shares[0]])
    measured: list[Array] = []
    for share in shares:
        columns = [np.asarray(sweep[share].get(task, ()), dtype=float) for task in tasks]
        if not columns or not len(columns[0]) or len({len(column) for column in columns}) > 1:
            raise InputError(
                f"share {share:g}: every task needs a value for every batch measured; found "
                f"{[len(column) for column in columns]} for {', '.join(tasks) or 'no task'}"
            )
        measured.append(np.stack(columns))
    medians = _medians(measured)
    best = int(np.argmin(medians.max(axis=1)))
    crossing = _crossing(shares, medians)

    generator = np.random.default_rng(seed)
    votes = dict.fromkeys(shares, 0.0)
    rates, crossings = [], []
    for _ in range(DRAWS):
        drawn = _medians([v[:, generator.integers(v.shape[1], size=v.shape[1])] for v in measured])
        worst = drawn.max(axis=1)
        votes[shares[int(np.argmin(worst))]] += 1 / DRAWS
        rates.append(_rate(float(worst[best])))
        if (seen := _crossing(shares, drawn)) is not None:
            crossings.append(seen)
    smallest = float(medians[best].max())
    return Recommendation(
        share=shares[best],
        critical_sharpness=smallest,
        lr=_rate(smallest),
        limits=tasks[int(np.argmax(medians[best]))],
        lr_interval=_interval(rates),
        votes=votes,
        crossing=crossing,
        crossing_interval=_interval(crossings) if 2 * len(crossings) >= DRAWS else None,
        batches=min(values.shape[1] for values in measured),
    )


def _medians(measured: Sequence[Array]) -> Array:
    """[shares, tasks]; the upper of the two in the middle, so that ∞ makes no NaN."""
    return np.stack([np.sort(values, axis=1)[:, values.shape[1] // 2] for values in measured])


def _rate(sharpness: float) -> float:
    return 2.0 / sharpness if sharpness > 0 else math.inf


def _crossing(shares: Sequence[float], medians: Array) -> float | None:
    """Where the task that limits one share gives way to the one that limits the next.

    Of several, the one that leaves the largest learning rate.
    """
    limits = medians.argmax(axis=1)
    found: list[tuple[float, float]] = []
    for i in range(len(shares) - 1):
        tasks = [limits[i], limits[i + 1]]
        if tasks[0] == tasks[1]:
            continue
        (first, other), (first_after, other_after) = map(_rates, medians[i : i + 2][:, tasks])
        if not math.isfinite(first + other + first_after + other_after):
            continue
        before, after = other - first, first_after - other_after
        part = before / (before + after) if before + after > 0 else 0.5
        rate = first + part * (first_after - first)
        found.append((rate, shares[i] + part * (shares[i + 1] - shares[i])))
    return max(found)[1] if found else None


def _rates(sharpness: Array) -> list[float]:
    return [_rate(float(value)) for value in sharpness]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], method="nearest")
    return float(low), float(high)
