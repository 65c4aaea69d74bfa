"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from experiments import training
from experiments.warmup import criterion
from experiments.warmup.criterion import Cell
from experiments.warmup.run import EVERY, MODELS

PAPER = "warm-up paper"
TITLES = {"digits-sharp": "digits, sharp start", "digits-flat": "digits, flat start", "gpt": "GPT"}
NAMES = {"sgd": "SGD", "adam": "Adam", "gi-adam": "GI-Adam"}
PAIRS = {
    f"{TITLES[model]}, {NAMES[optimizer]}": (model, optimizer)
    for model in MODELS
    for optimizer in ("sgd", "adam")
}

Grid = dict[tuple[str, str, int, float], Cell]


def claims(runs: training.Runs) -> training.Found:
    cells = criterion.cells(runs)
    grid = grid_of(cells)
    yield from _starts(runs)
    text = f"a long warm-up trains at larger target rates ({PAPER}, Sec. 4): largest with / without"
    for case, pair in PAIRS.items():
        yield text, case, room(grid, *pair), 1.5, np.inf
    text = "and changes little at the lowest one: final loss with 64 steps / without"
    for case, pair in PAIRS.items():
        lowest = targets(grid, *pair)[0]
        ratio = final(grid, *pair, 64, lowest) / final(grid, *pair, 1, lowest)
        yield text, case, ratio, 0.8, 1.25
    text = "it gains more from a sharp start than from a flat one: the former, sharp / flat"
    for optimizer in ("sgd", "adam"):
        ratio = room(grid, "digits-sharp", optimizer) / room(grid, "digits-flat", optimizer)
        yield text, NAMES[optimizer], ratio, 1.5, np.inf
    text = f"λ_c stays below the falling 2/η of a warm-up ({PAPER}, Sec. 4): share of measurements"
    for case, pair in PAIRS.items():
        yield text, case, np.mean(np.array(in_ramps(grid, *pair)) <= 1.0), 0.8, 1.0
    text = "and the higher the target, the lower λ_c after it: highest that trains / lowest"
    for case, pair in PAIRS.items():
        ends = largest(grid, *pair, 64), targets(grid, *pair)[0]
        high, low = (after(grid, *pair, 64, target) for target in ends)
        yield text, case, high / low, 0.0, 0.5
    yield from _saving(cells)
    yield from _gi_adam(runs, grid)


def _starts(runs: training.Runs) -> training.Found:
    text = f"curvature falls from a sharp start, and rises from a flat one ({PAPER}, Sec. 4): λ_max"
    for model, lowest, highest in (
        ("digits-sharp", 0.0, 0.95), ("digits-flat", 1.0, np.inf), ("gpt", 1.0, np.inf)
    ):  # fmt: skip
        yield text, TITLES[model], natural(runs, model, "sgd"), lowest, highest


def _saving(cells: list[Cell]) -> training.Found:
    text = f"to begin at η_c saves steps at equal final loss ({PAPER}, Sec. 6): share of cells"
    for case in ("sgd", "adam"):
        found = criterion.outcome(cell for cell in cells if cell.optimizer == case)
        yield text, f"{NAMES[case]}, {found.cells} cells", found.save / found.cells, 0.9, 1.0
    text = "and diverges nowhere that the plain warm-up trains: cells lost"
    found = criterion.outcome(cells)
    yield text, f"of {found.cells}", found.lost, 0, 0


def _gi_adam(runs: training.Runs, grid: Grid) -> training.Found:
    text = f"GI-Adam begins where λ_c is lower ({PAPER}, Sec. 6): λ_c of its first update / Adam's"
    for model in MODELS:
        first = [runs[f"start-{model}-{o}"][0]["critical_lr"] for o in ("adam", "gi-adam")]
        yield text, TITLES[model], first[0] / first[1], 0.0, 0.5
    text = "and trains at larger rates without a warm-up: its largest rate / Adam's"
    for model in MODELS:
        ratio = largest(grid, model, "gi-adam", 1) / largest(grid, model, "adam", 1)
        yield text, TITLES[model], ratio, 1.5, np.inf
    text = "to a lower loss: share of cells, with a warm-up of 64 steps or none"
    for model in MODELS:
        pairs = [
            (cell, grid[model, "adam", cell.warmup, cell.target])
            for cell in grid.values()
            if (cell.model, cell.optimizer) == (model, "gi-adam")
        ]
        lower = [np.mean(a.losses("plain")) <= np.mean(b.losses("plain")) for a, b in pairs]
        yield text, TITLES[model], np.mean(lower), 0.5, 1.0


def natural(runs: training.Runs, model: str, optimizer: str) -> float:
    """The exact curvature after steps at a low rate over that at the first."""
    field = "hessian_sharpness" if optimizer == "sgd" else "preconditioned_sharpness"
    found = [row[field] for row in runs[f"start-{model}-{optimizer}"] if field in row]
    return float(found[-1] / found[0])


def grid_of(cells: Iterable[Cell]) -> Grid:
    """By model, optimizer, length of warm-up and target rate."""
    return {(cell.model, cell.optimizer, cell.warmup, cell.target): cell for cell in cells}


def warmups(grid: Grid) -> list[int]:
    return sorted({warmup for _, _, warmup, _ in grid})


def targets(grid: Grid, model: str, optimizer: str) -> list[float]:
    return sorted({key[3] for key in grid if key[:2] == (model, optimizer)})


def largest(grid: Grid, model: str, optimizer: str, warmup: int) -> float:
    """The largest target rate that trains with every seed."""
    rates = targets(grid, model, optimizer)
    return max(rate for rate in rates if grid[model, optimizer, warmup, rate].trains())


def best(grid: Grid, model: str, optimizer: str, warmup: int) -> float:
    """The target rate of the lowest final loss."""
    rates = targets(grid, model, optimizer)
    return min(rates, key=lambda rate: final(grid, model, optimizer, warmup, rate))


def room(grid: Grid, model: str, optimizer: str) -> float:
    """The largest target rate with the longest warm-up over that without."""
    none, *_, longest = warmups(grid)
    with_it, without = (largest(grid, model, optimizer, w) for w in (longest, none))
    return with_it / without


def final(grid: Grid, model: str, optimizer: str, warmup: int, target: float) -> float:
    return float(np.mean(grid[model, optimizer, warmup, target].losses("plain")))


def in_ramps(grid: Grid, model: str, optimizer: str) -> list[float]:
    """η/η_c at every measurement in the warm-ups of the trainings that train."""
    return [
        ratio
        for cell in grid.values()
        if (cell.model, cell.optimizer) == (model, optimizer) and cell.warmup > 1 and cell.trains()
        for ratio in _ratios(cell)[: cell.warmup // EVERY]
        if ratio is not None
    ]


def after(grid: Grid, model: str, optimizer: str, warmup: int, target: float) -> float:
    """Median λ_c after the warm-up."""
    cell = grid[model, optimizer, warmup, target]
    ratios = [ratio for ratio in _ratios(cell)[cell.warmup // EVERY :] if ratio is not None]
    return 2.0 / cell.target * float(np.median(ratios))


def _ratios(cell: Cell) -> list[float | None]:
    found: list[float | None] = cell.rows[0]["lr_over_critical"]
    return found
