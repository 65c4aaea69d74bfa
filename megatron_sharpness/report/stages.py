"""Where a run stands, read off its curve of λ_c by rules of thumb.

The names of the four regimes of a training, early transient, intermediate saturation, progressive
sharpening and edge of stability, are those of Kalra and Barkeshli 2023 (arXiv 2302.12250). The
rules are ours: they put the field's words to a curve, and a look at the curve settles what they
leave open. All of them compare logarithms, since λ_c is read by factors, and use only measurements
that found η_c. Four quantities enter:

- *level*: the running median of log λ_c over √n of the n measurements, or ``WINDOW`` where that is
  more. One odd batch does not move it.
- *ratio*: the same running median of log(λ_c / line), the line being 2/η − γ. Its exponential is
  η/η_c but for the weight decay γ.
- *scatter*: the standard deviation of log λ_c from one measurement to the next, from the median of
  the absolute differences. Mini-batches make it 0.1 to 0.4.
- *trend*: a stretch in which the level moves one way by the factor ``TREND``, or by
  ``TREND_SCATTERS`` scatters where that is more, until it turns by as much. Its flat ends,
  ``TREND_ENDS`` of the movement each, do not belong to it.

Each measurement is in the first of these stages that fits:

- ``EDGE_OF_STABILITY``: at ``EDGE_LEAST`` measurements in a row or more the ratio lies within the
  factor ``BAND`` of the line, and λ_c itself reaches ``TOUCH`` of the line at the share
  ``TOUCHING`` of them. Mini-batch training, which stays below the line, does not.
- ``ABOVE_EDGE``: the ratio is above the line by more than ``BAND``.
- ``EARLY_TRANSIENT``: the first falling trend, if it begins in the first ``EARLY`` of the run, and
  what is before it. A spike of λ_c at its start, over in two or three measurements, is part of it.
- ``PROGRESSIVE_SHARPENING``: a rising trend.
- ``INTERMEDIATE_SATURATION``: none of these, before the first ``PROGRESSIVE_SHARPENING``, if that
  is half over while the line is within the factor ``BAND`` of its lowest: λ_c rests below the line,
  and then rises by itself and not because the learning rate decays. Of a run that has not risen yet
  it cannot be told.
- ``BELOW_EDGE``: none of these otherwise: λ_c is below the line and steady, or falling later on.

Fewer than ``LEAST`` measurements in a row of the last two are counted to the stage before.

Fewer than ``LEAST`` measurements that found η_c are ``TOO_FEW``.

A catapult event is found on the single measurements, since it is over in a few steps: λ_c is above
the line by the factor ``CATAPULT``, or by ``CATAPULT_SCATTERS`` scatters where that is more, and
within ``CATAPULT_WITHIN`` measurements of its peak falls below the line and to ``CATAPULT_FALL``
of the peak. Whether the loss rises with it to ``LOSS_SPIKE`` is reported and not asked for:
between two measurements a spike may be over.

The constants were chosen on full-batch runs whose stages are plain to see, and on noise: steady
λ_c at 0.75 of the line with a scatter of 0.2 is called an edge of stability in up to 5 of 100 runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_sharpness.report.records import Array, Curve, Run

EARLY_TRANSIENT = "early transient"
PROGRESSIVE_SHARPENING = "progressive sharpening"
EDGE_OF_STABILITY = "edge of stability"
INTERMEDIATE_SATURATION = "intermediate saturation"
ABOVE_EDGE = "above the edge"
BELOW_EDGE = "below the edge"
TOO_FEW = "too few measurements to tell"

LEAST = 5  # measurements
WINDOW = 6  # measurements
TREND = 1.25  # factor on λ_c
TREND_SCATTERS = 2.5
TREND_ENDS = 0.1  # share of the movement of log λ_c
EARLY = 0.25  # share of the measurements
BAND = 1.2  # factor on λ_c / line, to both sides
EDGE_LEAST = 8  # measurements
TOUCH = 0.95  # λ_c / line
TOUCHING = 0.44  # share of the measurements in the band; an alternation has 4 of 9
CATAPULT = 1.1  # λ_c / line
CATAPULT_SCATTERS = 4.0
CATAPULT_WITHIN = 20  # measurements
CATAPULT_FALL = 0.5  # share of the peak
LOSS_SPIKE = 1.1  # highest loss of the event / median loss of the ``WINDOW`` measurements before

#: The rules in a sentence each, for readers of the page.
RULES = {
    EARLY_TRANSIENT: f"λ_c falls by a factor of {TREND:g} or more, for the first time and beginning"
    f" in the first {EARLY:.0%} of the measurements.",
    PROGRESSIVE_SHARPENING: f"λ_c rises by a factor of {TREND:g} or more, below the line.",
    EDGE_OF_STABILITY: f"λ_c stays within a factor of {BAND:g} of the line 2/η − γ for "
    f"{EDGE_LEAST} measurements or more, and {TOUCHING:.0%} of them reach {TOUCH:g} of it.",
    ABOVE_EDGE: f"λ_c stays above the line by more than a factor of {BAND:g}.",
    INTERMEDIATE_SATURATION: "None of these: λ_c rests below the line before its first progressive "
    "sharpening, which does not come from a decay of the learning rate.",
    BELOW_EDGE: "None of these: λ_c is below the line and steady, or falling later on.",
    "catapult event": f"λ_c is above the line by a factor of {CATAPULT:g} or more, and within "
    f"{CATAPULT_WITHIN} measurements falls below it and to {CATAPULT_FALL:.0%} of its peak. A loss "
    f"spike is a loss of {LOSS_SPIKE:g} times the median before, or more.",
}
NOISE_RULE = (
    "All of it is judged on the running median of log λ_c, but for catapult events. Where λ_c "
    f"scatters from one measurement to the next, trends must exceed {TREND_SCATTERS:g} and "
    f"catapult events {CATAPULT_SCATTERS:g} standard deviations of that scatter. Measurements that "
    f"found no η_c are left out, and fewer than {LEAST} that did are too few to tell."
)


@dataclass(frozen=True)
class Stage:
    """A stretch of the run in one stage, from iteration ``first`` to ``last``, both measured."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Catapult:
    """λ_c crosses the line and falls back.

    Attributes:
        first: iteration of the first measurement clearly above the line.
        peak: iteration of the highest λ_c.
        last: iteration at which λ_c has fallen back.
        ratio: λ_c / (2/η − γ) at the peak.
        loss_ratio: highest loss of the event over the median loss before it; ``None`` where the
            loss is not known.
    """

    first: int
    peak: int
    last: int
    ratio: float
    loss_ratio: float | None

    def __str__(self) -> str:
        """The event in a line, for readers."""
        if self.loss_ratio is None:
            loss = "loss not known"
        elif self.loss_ratio >= LOSS_SPIKE:
            loss = f"loss spike of {_three_digits(self.loss_ratio)} × the loss before"
        else:
            loss = "no loss spike seen"
        return f"{self.first}–{self.last}: λ_c {_three_digits(self.ratio)} × the line, {loss}"


@dataclass(frozen=True)
class Stages:
    """The stages of a run in order, without gaps, and its catapult events."""

    stages: tuple[Stage, ...]
    catapults: tuple[Catapult, ...]

    @property
    def now(self) -> str:
        """The last stage: that of the last measurement that found η_c."""
        return self.stages[-1].name if self.stages else TOO_FEW


def stages_of(run: Run) -> Stages:
    """The stages of ``run``, by :func:`find_stages`."""
    return find_stages(
        run.column("iteration"),
        run.column("critical_sharpness"),
        run.column("edge_of_stability"),
        [record["status"] for record in run.records],
        run.curve("loss"),
    )


def where_it_stands(run: Run) -> str:
    """The last stage, and as of when, where measurements without η_c came after it."""
    stages = stages_of(run)
    if not stages.stages or stages.stages[-1].last == run.records[-1]["iteration"]:
        return stages.now
    return f"{stages.now}, as of iteration {stages.stages[-1].last}"


def find_stages(
    iteration: Array,
    sharpness: Array,
    edge: Array,
    status: Sequence[str],
    loss: Curve | None = None,
) -> Stages:
    """Find the stages and catapult events of one run by the rules above.

    Args:
        iteration: iterations that were measured, ascending.
        sharpness: λ_c at each.
        edge: 2/η − γ at each.
        status: how each measurement ended; those without a number are not used.
        loss: as densely as it is known; catapult events quote it.
    """
    used = np.isin(status, ["found"]) & (sharpness > 0) & (edge > 0) & np.isfinite(sharpness)
    if used.sum() < LEAST:
        return Stages((), ())
    iteration, log_sharpness = iteration[used], np.log(sharpness[used])
    log_ratio = log_sharpness - np.log(edge[used])
    scatter = scatter_of(log_sharpness)

    names = np.full(len(iteration), BELOW_EDGE, dtype=object)
    level = running_median(log_sharpness)
    trends = _trends(level, max(np.log(TREND), TREND_SCATTERS * scatter))
    for first, last in trends:
        rises = level[last] > level[first]
        first, last = _without_flat_ends(level, first, last)
        if rises:
            names[first : last + 1] = PROGRESSIVE_SHARPENING
        elif first < EARLY * len(level) and EARLY_TRANSIENT not in names:
            names[: last + 1][names[: last + 1] == BELOW_EDGE] = EARLY_TRANSIENT
    ratio = running_median(log_ratio)
    names[ratio > np.log(BAND)] = ABOVE_EDGE
    for first, last in _stretches(np.abs(ratio) <= np.log(BAND)):
        touching = np.mean(log_ratio[first : last + 1] >= np.log(TOUCH))
        if last - first + 1 >= EDGE_LEAST and touching >= TOUCHING:
            names[first : last + 1] = EDGE_OF_STABILITY

    for first, last in _stretches(names == BELOW_EDGE):
        if last - first + 1 < LEAST:
            names[first : last + 1] = names[first - 1] if first else names[last + 1]
    for first, last in _stretches(names == PROGRESSIVE_SHARPENING)[:1]:
        if edge[used][(first + last) // 2] <= BAND * np.min(edge[used]):
            names[:first][names[:first] == BELOW_EDGE] = INTERMEDIATE_SATURATION

    starts = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1), len(names)]
    stages = tuple(
        Stage(str(names[first]), int(iteration[first]), int(iteration[end - 1]))
        for first, end in pairwise(starts)
    )
    return Stages(stages, _catapults(iteration, log_sharpness, log_ratio, scatter, loss))


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"


def running_median(values: Array) -> Array:
    """Median over a window around each value, which is cut off at both ends of the run.

    The number of values is even: at the edge of stability λ_c alternates from step to step, and the
    median of an odd number would be now the upper and now the lower one.
    """
    n = len(values)
    half = max(WINDOW, round(n**0.5)) // 2
    medians = np.empty(n)
    for i in range(n):
        first, end = max(0, i - half), min(n, i + half)
        if (end - first) % 2:
            first, end = (first, end + 1) if end < n else (max(0, first - 1), end)
        medians[i] = np.median(values[first:end])
    return medians


def smoothed(values: Array) -> Array:
    """The running median of what is positive and finite, on a logarithmic scale; NaN elsewhere."""
    there = np.isfinite(values) & (values > 0.0)
    result = np.full(len(values), np.nan)
    result[there] = np.exp(running_median(np.log(values[there])))
    return result


def scatter_of(values: Array) -> float:
    """Standard deviation of independent noise on ``values``, not moved by outliers."""
    return float(1.4826 * np.median(np.abs(np.diff(values))) / np.sqrt(2))  # normal distribution


def _trends(level: Array, least: float) -> list[tuple[int, int]]:
    """First and last index of each movement by ``least`` or more, from turn to turn."""
    turns: list[int] = []
    low = high = direction = 0
    for i, value in enumerate(level):
        low = i if value < level[low] else low
        high = i if value > level[high] else high
        if direction <= 0 and value - level[low] >= least:
            turns.append(low)
            direction, high = 1, i
        elif direction >= 0 and level[high] - value >= least:
            turns.append(high)
            direction, low = -1, i
    if turns:
        turns.append(high if direction > 0 else low)
    return list(pairwise(turns))


def _without_flat_ends(level: Array, first: int, last: int) -> tuple[int, int]:
    """The trend from where the level leaves its start to where it gets near its end."""
    progress = (level[first : last + 1] - level[first]) / (level[last] - level[first])
    leaves = int(np.flatnonzero(progress <= TREND_ENDS)[-1])
    arrives = int(np.flatnonzero(progress >= 1 - TREND_ENDS)[0])
    return first + leaves, first + arrives


def _stretches(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last index of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(int)))
    return [(int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2], strict=True)]


def _catapults(
    iteration: Array,
    log_sharpness: Array,
    log_ratio: Array,
    scatter: float,
    loss: Curve | None,
) -> tuple[Catapult, ...]:
    clearly_above = log_ratio >= max(np.log(CATAPULT), CATAPULT_SCATTERS * scatter)
    events: list[Catapult] = []
    first = 0
    while first < len(iteration):
        if not clearly_above[first]:
            first += 1
            continue
        last = peak = first
        fell = False
        while not fell and last + 1 < len(iteration) and last - peak < CATAPULT_WITHIN:
            last += 1
            peak = last if log_sharpness[last] > log_sharpness[peak] else peak
            fell = bool(
                log_sharpness[last] <= log_sharpness[peak] + np.log(CATAPULT_FALL)
                and log_ratio[last] < 0
            )
        if fell:
            loss_ratio = None
            if loss is not None:
                before = iteration[max(0, first - WINDOW)]
                loss_ratio = _loss_ratio(loss, before, iteration[first], iteration[last])
            events.append(
                Catapult(
                    first=int(iteration[first]),
                    peak=int(iteration[peak]),
                    last=int(iteration[last]),
                    ratio=float(np.exp(log_ratio[peak])),
                    loss_ratio=loss_ratio,
                )
            )
        first = last + 1
    return tuple(events)


def _loss_ratio(curve: Curve, before: float, first: float, last: float) -> float | None:
    """Highest loss from ``first`` to ``last`` over the median loss from ``before`` to ``first``."""
    iteration, loss = curve.iteration, curve.values
    reference = loss[(iteration >= before) & (iteration < first) & np.isfinite(loss)]
    event = loss[(iteration >= first) & (iteration <= last) & np.isfinite(loss)]
    if not len(reference) or not len(event) or np.median(reference) <= 0:
        return None
    return float(np.max(event) / np.median(reference))
