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
        """Final losses of ``plain``, ``cut`` or ``shorter``; infinite where there is none."""
        found = (row.get(which) for row in self.rows)
        return [math.inf if loss is None else loss for loss in found]

    def trains(self, which: str = "plain") -> bool:
        """With every seed."""
        return max(self.losses(which)) < TRAINS * chance(self.model.split("-")[0])

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

    @property
    def saves(self) -> bool:
        return self.saved >= 1 and self.equal("cut")

    @property
    def lost(self) -> bool:
        return any(row["saved"] for row in self.rows) and not self.trains("cut")


@dataclass(frozen=True)
class Outcome:
    """Of the criterion, over cells."""

    cells: int
    save: int
    lost: int
    nothing: int  # to save: less than a step

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


def outcome(found: Iterable[Cell]) -> Outcome:
    those = judged(found)
    return Outcome(
        len(those),
        sum(cell.saves for cell in those),
        sum(cell.lost for cell in those),
        sum(cell.saved == 0 and not cell.lost for cell in those),
    )
