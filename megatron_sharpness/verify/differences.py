"""Where trainings that should be the same part: iteration, rank and name."""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_sharpness.verify.traces import Prints, RankTrace, Trace

#: Trainings that do not repeat by themselves part at random. The tensors of one with measurement
#: are to lie within so many times the distance of two without, in the median, after each iteration.
#: Where all that chance does goes one way, by a normal number in each training, three of them miss
#: that in 2/π·arctan(√(3/4)/30), two of a hundred.
FACTOR = 30.0


@dataclass(frozen=True)
class Difference:
    """The first iteration after which a rank is not what it was in another run.

    Attributes:
        iteration: its number; the one before the first is the beginning.
        rank: the first one.
        names: what differs on that rank.
    """

    iteration: int
    rank: int
    names: tuple[str, ...]


@dataclass
class Comparison:
    """Two trainings without measurement and one with it.

    Attributes:
        values: how many values of all ranks are compared after an iteration.
        iterations: how many were made.
        start: the number that what was before the first one has.
        by_itself: where the two without it part; None if they do not.
        disturbed: where the one with it leaves them.
        unsteady: what differs between the two without it and is no tensor: clocks, names of
            folders, random states without a seed. It is not compared.
        ratio: by iteration, where they do not repeat: how many times as far the one with it lies
            from the nearer one of the two as these are apart, in the median over all tensors.
        log_lines: how many lines of the log are compared.
        log_unsteady: what in them differs between the two without it: times. It is not compared.
        log_differs: the first one that the measurement changes: iteration and names.
    """

    values: int = 0
    iterations: int = 0
    start: int = 0
    by_itself: Difference | None = None
    disturbed: Difference | None = None
    unsteady: set[str] = field(default_factory=set)
    ratio: dict[int, float] = field(default_factory=dict)
    log_lines: int = 0
    log_unsteady: tuple[str, ...] = ()
    log_differs: tuple[int, tuple[str, ...]] | None = None

    @property
    def repeats(self) -> bool:
        """Whether training does by itself."""
        return self.by_itself is None

    @property
    def beyond(self) -> list[int]:
        """Iterations after which the one with it lies farther away than chance lets them part."""
        return [i for i, ratio in self.ratio.items() if ratio > FACTOR]

    @property
    def same(self) -> bool:
        """Whether measuring has changed nothing, as far as chance lets that be told."""
        return self.disturbed is None and self.log_differs is None and not self.beyond


def compare(first: Trace, second: Trace, measured: Trace) -> Comparison:
    """The runs of :mod:`megatron_sharpness.verify`, rank by rank.

    Args:
        first, second: without measurement.
        measured: with it.
    """
    found = Comparison()
    for rank in range(first.ranks):
        _plain_rank(found, rank, *(run.rank(rank) for run in (first, second)))
    ratios: dict[int, list[_Ratios]] = {}
    for rank in range(first.ranks):
        _measured_rank(found, ratios, rank, *(run.rank(rank) for run in (first, second, measured)))
    for i, pair in ratios.items():
        found.ratio[i] = min(each.median for each in pair)
    _compare_logs(found, first.log, second.log, measured.log)
    return found


def _plain_rank(found: Comparison, rank: int, first: RankTrace, second: RankTrace) -> None:
    """The two without measurement."""
    found.values += max(map(len, first.prints.values()), default=0)
    found.iterations, found.start = len(first.made), next(iter(first.prints))
    for i, prints in first.prints.items():
        others = second.prints.get(i, {})
        names = [name for name in _unequal(prints, others) if name not in found.unsteady]
        state = [
            name
            for name in names
            if any(len(run.get(name, ())) == 3 for run in (prints, others))
            # Random states that no seed was given begin with others in each process.
            or (name.startswith("random states") and i != found.start)
        ]
        found.unsteady.update(set(names) - set(state))
        if state:
            found.by_itself = _earlier(found.by_itself, Difference(i, rank, tuple(state)))


def _measured_rank(
    found: Comparison, ratios: dict[int, list[_Ratios]], rank: int, *runs: RankTrace
) -> None:
    first, second, measured = runs
    parted = math.inf if found.by_itself is None else found.by_itself.iteration
    for i, prints in first.prints.items():
        other, now = second.prints.get(i, {}), measured.prints.get(i, {})
        names = [name for name in _unequal(prints, now) if name not in found.unsteady]
        if i >= parted:  # what has repeated all the same, and is no number that chance moves
            steady = set(names) - set(_unequal(prints, other))
            names = [name for name in names if name in steady and not _moves(prints.get(name))]
            from_first, from_second = ratios.setdefault(i, [_Ratios(), _Ratios()])
            from_first.add(now, prints, other)
            from_second.add(now, other, prints)
        if names:
            found.disturbed = _earlier(found.disturbed, Difference(i, rank, tuple(names)))


class _Ratios:
    """|⟨w − v, z⟩| / |⟨u − v, z⟩| of tensors of the same name, in a run with measurement (w) and
    two without (v, u); z is that of :class:`~megatron_sharpness.core.recorder.Sketches`."""

    def __init__(self) -> None:
        self._values = array("d")

    def add(self, measured: Prints, plain: Prints, other: Prints) -> None:
        for name, value in plain.items():
            runs = (measured.get(name), value, other.get(name))
            if not all(map(_moves, runs)):
                continue
            w, v, u = (float(run[1]) for run in runs if run is not None)
            if w != v or u != v:
                self._values.append(abs(w - v) / abs(u - v) if u != v else math.inf)

    @property
    def median(self) -> float:
        return statistics.median(self._values) if self._values else 0.0


def _moves(value: list[Any] | None) -> bool:
    """Whether it is a tensor of floating-point numbers."""
    return value is not None and len(value) == 3 and bool(float(value[2]))


def _unequal(some: Prints, others: Prints) -> list[str]:
    names = {**some, **others}
    return [name for name in names if some.get(name, [])[:1] != others.get(name, [])[:1]]


def _earlier(one: Difference | None, other: Difference) -> Difference:
    if one is None or (other.iteration, other.rank) < (one.iteration, one.rank):
        return other
    return one


def _compare_logs(found: Comparison, *logs: dict[int, dict[str, str]]) -> None:
    first, second, measured = logs
    names = list(dict.fromkeys(name for line in first.values() for name in line))
    steady = [n for n in names if all(_said(first, i, n) == _said(second, i, n) for i in first)]
    found.log_lines = len(first)
    found.log_unsteady = tuple(name for name in names if name not in steady)
    for i in first:
        if differs := [n for n in steady if _said(first, i, n) != _said(measured, i, n)]:
            found.log_differs = (i, tuple(differs))
            return


def _said(log: dict[int, dict[str, str]], iteration: int, name: str) -> str | None:
    return log.get(iteration, {}).get(name)


def grouped(names: Iterable[str], most: int = 8) -> str:
    """The first of many names, and how many they are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
