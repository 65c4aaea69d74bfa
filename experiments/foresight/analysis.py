"""Whether a signal tells a loss spike some steps ahead."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.foresight.run import AT_ONCE, WARMUP, Trained
from megatron_sharpness.core.alarm import AlarmBell
from megatron_sharpness.core.measurement import TRAIN, Measurement

Array = NDArray[np.float64]
Runs = dict[str, Trained]

#: A spike: the loss is ``HIGHER`` times the median of the ``BEFORE`` steps before it, and above it
#: by ``SCATTERS`` scatters from step to step; after one, ``BEFORE`` steps begin no other.
BEFORE, HIGHER, SCATTERS = 20, 1.1, 4.0
#: So many steps ahead.
AHEAD = (1, 5, 20)
#: How often runs are drawn anew.
DRAWN = 200
#: Alarms tried: above which η/η_c, after how many in a row.
ALARMS = ((1.0, 1), (1.0, 2), (1.0, 3), (2.0, 1), (2.0, 2), (2.0, 3))
#: What is known without a measurement, and what a measurement adds.
RIVALS = ("loss", "gradient norm")
OURS = ("η/η_c", "its median of 5", "its rise", "attention's", "MLP's")
SIGNALS = (*RIVALS, *OURS)


@functools.cache
def spikes(run: Trained) -> list[int]:
    """Indices of the first step of each spike. The loss of a bad batch is none: only what follows
    is the training's."""
    loss = _losses(run)
    found: list[int] = []
    for at in range(WARMUP + BEFORE, len(loss)):
        before = loss[at - BEFORE : at]
        before = before[np.isfinite(before)]
        level, scatter = np.median(before), 1.4826 * np.median(np.abs(np.diff(before))) / 2**0.5
        high = loss[at] > max(HIGHER * level, level + SCATTERS * scatter)
        if high and (not found or at - found[-1] > BEFORE):
            found.append(at)
    return found


@functools.cache
def signals(run: Trained) -> dict[str, Array]:
    """Logarithms of all :data:`SIGNALS` at each step, as they are known once it is over."""
    loss, norm, ratio = (
        np.log(_filled(values)) for values in (run.loss, run.grad_norm, run.ratio)
    )
    attention, mlp = np.log(_filled(run.attention)), np.log(_filled(run.mlp))
    five = np.array([np.median(ratio[max(0, at - 4) : at + 1]) for at in range(len(ratio))])
    return dict(
        zip(
            SIGNALS,
            (_rise(loss), _rise(norm), ratio, five, _rise(ratio), attention, mlp),
            strict=True,
        )
    )


@dataclass(frozen=True)
class Moments:
    """The steps of a run at which something may be foretold.

    Attributes:
        values: [steps, signals].
        comes: whether a spike begins within the steps ahead.
    """

    values: Array
    comes: NDArray[np.bool_]


def moments(run: Trained, ahead: int) -> Moments:
    """All but those within ``BEFORE`` steps of a spike's beginning, which is its aftermath."""
    begins = np.array(spikes(run))
    every = np.stack(list(signals(run).values()), axis=-1)
    steps = np.arange(WARMUP + BEFORE - 1, len(run.loss) - ahead)
    since = steps[:, None] - begins  # [steps, spikes]
    steps, since = (each[~((since >= 0) & (since < BEFORE)).any(1)] for each in (steps, since))
    return Moments(every[steps], ((since < 0) & (since >= -ahead)).any(1))


def within_runs(runs: Runs, ahead: int) -> dict[str, list[float]]:
    """For each signal the areas under the curve (AUC) of the runs that have a spike: how often it
    is higher before one than elsewhere in the same run; 1/2 is chance."""
    areas: dict[str, list[float]] = {name: [] for name in SIGNALS}
    for run in runs.values():
        seen = moments(run, ahead)
        if seen.comes.any() and not seen.comes.all():
            for number, name in enumerate(SIGNALS):
                areas[name].append(float(roc_auc_score(seen.comes, seen.values[:, number])))
    return areas


@dataclass(frozen=True)
class Foretold:
    """How a combination of signals did on runs that it was not fitted on.

    Attributes:
        area: AUC over all their moments.
        lowest, highest: the central 90 % of it over runs drawn anew with replacement.
        within: mean of the AUC in each run that has a spike: without what tells one run from
            another.
        precision, recall: of what is foretold above the threshold of the best F1 where it was
            fitted.
        rate: how often a spike comes: the precision of chance.
    """

    area: float
    lowest: float
    highest: float
    within: float
    precision: float
    recall: float
    rate: float


def foretold(chosen: Runs, tried: Runs, ahead: int, names: Sequence[str]) -> Foretold:
    """A logistic regression on these signals, fitted on some runs and tried on others."""
    columns = [SIGNALS.index(name) for name in names]
    fitted = [moments(run, ahead) for run in chosen.values()]
    values = np.concatenate([each.values[:, columns] for each in fitted])
    comes = np.concatenate([each.comes for each in fitted])
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    model.fit(values, comes)
    threshold = _best_threshold(model.decision_function(values), comes)

    seen = [each for run in tried.values() if len((each := moments(run, ahead)).comes)]
    scores = [model.decision_function(each.values[:, columns]) for each in seen]

    def area(runs: Iterable[int]) -> float:
        those = list(runs)
        came = np.concatenate([seen[run].comes for run in those])
        return float(roc_auc_score(came, np.concatenate([scores[run] for run in those])))

    both = [number for number, each in enumerate(seen) if 0 < each.comes.sum() < len(each.comes)]
    random = np.random.default_rng(0)
    drawn = [area(random.integers(len(seen), size=len(seen))) for _ in range(DRAWN)]
    comes = np.concatenate([each.comes for each in seen])
    said = np.concatenate(scores) >= threshold
    return Foretold(
        area(range(len(seen))),
        *(float(end) for end in np.quantile(drawn, (0.05, 0.95))),
        within=float(np.mean([area([run]) for run in both])),
        precision=float(comes[said].mean()) if said.any() else math.nan,
        recall=float(said[comes].mean()),
        rate=float(comes.mean()),
    )


def doubled(run: Trained) -> int | None:
    """The first step at which the loss, of three steps' median, is twice its lowest before."""
    loss = _losses(run)
    loss = loss[np.isfinite(loss)]
    level = np.array([np.median(loss[max(0, at - 2) : at + 1]) for at in range(len(loss))])
    (at,) = np.nonzero(level >= 2.0 * np.minimum.accumulate(level))
    return int(at[0]) + 1 if len(at) else None


def rings(run: Trained, threshold: float, after: int) -> list[int]:
    """The steps at which an alarm begins."""
    bell = AlarmBell(threshold, after)
    begins = []
    for step, ratio in enumerate(run.ratio.tolist(), 1):
        record = Measurement(step, None, 1.0, TRAIN, "found", lr_over_critical=ratio)
        if not math.isnan(ratio) and (alarm := bell.observe(record)) is not None and alarm.on:
            begins.append(step)
    return begins


@dataclass(frozen=True)
class Warned:
    """What an alarm does.

    Attributes:
        threshold, after: above which η/η_c, after how many in a row.
        before: runs whose loss doubles in which it begins in the ``BEFORE`` steps before that.
        doubles: runs whose loss doubles.
        elsewhere: how often it begins in 1,000 steps of the others.
    """

    threshold: float
    after: int
    before: int
    doubles: int
    elsewhere: float


def alarms(runs: Runs) -> Iterator[Warned]:
    """Of each of :data:`ALARMS`."""
    doubles = {name: at for name, run in runs.items() if (at := doubled(run)) is not None}
    others = [run for name, run in runs.items() if name not in doubles]
    steps = sum(len(run.loss) for run in others)
    for threshold, after in ALARMS:
        before = sum(
            any(at - BEFORE <= ring < at for ring in rings(runs[name], threshold, after))
            for name, at in doubles.items()
        )
        rang = sum(len(rings(run, threshold, after)) for run in others)
        yield Warned(threshold, after, before, len(doubles), 1000.0 * rang / steps)


def _losses(run: Trained) -> Array:
    bad = [run.case.is_bad(step) for step in range(1, len(run.loss) + 1)]
    return np.where(bad, np.nan, run.loss)


def _rise(values: Array) -> Array:
    """Above the median of the steps before."""
    return np.array(
        [
            values[at] - np.median(values[max(0, at - BEFORE) : at]) if at else 0.0
            for at in range(len(values))
        ]
    )


def _filled(values: Array) -> Array:
    """Positive and finite: what is missing is as it was, and what never rises next to nothing."""
    last = 1.0
    filled = []
    for value in values:
        last = last if math.isnan(value) else float(np.clip(value, 1e-6, AT_ONCE))
        filled.append(last)
    return np.array(filled)


def _best_threshold(scores: Array, comes: NDArray[np.bool_]) -> float:
    """Of the highest F1."""
    order = np.argsort(-scores)
    hits = np.cumsum(comes[order])
    f1 = 2.0 * hits / (np.arange(1, len(hits) + 1) + comes.sum())
    return float(scores[order[int(np.argmax(f1))]])
