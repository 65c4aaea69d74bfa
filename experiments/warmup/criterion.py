"""Does it save warm-up steps to begin at η_c? The criterion, as it was before the trainings were.

- A training *trains* where its final loss is below 0.9 of :func:`experiments.warmup.run.chance`;
  all else has diverged.
- A *cell* is a model, an optimizer (SGD or Adam), a length of warm-up (more than none) and a target
  rate, where the plain warm-up trains with every seed.
- A cell *saves* where beginning at η_c saves a step or more with every seed, trains with every
  seed, and its mean final loss is not above the plain warm-up's by more than the standard
  deviation of the plain ones over the seeds.
- A cell is *lost* where beginning at η_c diverges with some seed.
- The criterion is *met* where nine of ten cells save and none is lost.

That is of ``cut``, which ends as many steps earlier as it saves. Added once the first seed had been
seen, since so short a training is slow rather than diverged: the same of ``same``, which begins at
η_c and is as long as the plain warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from experiments import training
from experiments.warmup.run import chance

#: Of what is had without a look at the input.
TRAINS = 0.9
#: Of the cells.
SHARE = 0.9


@dataclass(frozen=True)
class Cell:
    """A point of the grid, with a row for each seed."""

    model: str
    optimizer: str
    warmup: int
    target: float
    rows: tuple[training.Row, ...]

    def losses(self, which: str) -> list[float]:
        """Final losses of ``plain``, or ``cut``, ``same``, ``shorter``: plain too where no step is
        saved. What is not finite is infinite."""
        found = (row.get(which, row["plain"]) for row in self.rows)
        return [math.inf if loss is None else loss for loss in found]

    @property
    def bound(self) -> float:
        """The final loss below which a training trains."""
        return TRAINS * chance(self.model.split("-")[0])

    def trains(self, which: str = "plain") -> bool:
        """With every seed."""
        return max(self.losses(which)) < self.bound

    @property
    def saved(self) -> int:
        """Steps, with the seed that saves the fewest."""
        return int(min(row["saved"] for row in self.rows))

    @property
    def scatter(self) -> float:
        return float(np.std(self.losses("plain"), ddof=1))

    def equal(self, which: str) -> bool:
        """Whether its mean final loss is no more than the scatter above the plain warm-up's."""
        means = np.mean(self.losses(which)), np.mean(self.losses("plain"))
        return self.trains(which) and bool(means[0] <= means[1] + self.scatter)

    def saves(self, which: str = "cut") -> bool:
        return self.saved >= 1 and self.equal(which)

    def lost(self, which: str = "cut") -> bool:
        return not self.trains(which)


@dataclass(frozen=True)
class Outcome:
    """Of the criterion, over cells.

    Attributes:
        cells: how many are judged.
        save, lost: those that are so.
        nothing: those where less than a step is to be saved.
    """

    cells: int
    save: int
    lost: int
    nothing: int

    @property
    def met(self) -> bool:
        return self.save >= SHARE * self.cells and self.lost == 0


def cells(runs: training.Runs) -> list[Cell]:
    """All points of the grid that were trained, those of GI-Adam and without warm-up too."""
    points: dict[tuple[str, str, int, float], list[training.Row]] = {}
    for row in (row for rows in runs.values() for row in rows if "plain" in row):
        key = row["model"], row["optimizer"], row["warmup"], row["target"]
        points.setdefault(key, []).append(row)
    return [Cell(*key, tuple(rows)) for key, rows in points.items()]


def judged(found: Iterable[Cell]) -> list[Cell]:
    """Those that count."""
    return [
        cell for cell in found
        if cell.optimizer != "gi-adam" and cell.warmup > 1 and cell.trains()
    ]  # fmt: skip


def outcome(found: Iterable[Cell], which: str = "cut") -> Outcome:
    those = judged(found)
    return Outcome(
        len(those),
        sum(cell.saves(which) for cell in those),
        sum(cell.lost(which) for cell in those),
        sum(cell.saved == 0 for cell in those),
    )
