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

#: A target rate at which Adam needs a warm-up.
HIGH = 0.064

Grid = dict[tuple[str, str, int, float], Cell]


def claims(runs: training.Runs) -> training.Found:
    cells = criterion.cells(runs)
    grid = grid_of(cells)
    yield from _starts(runs, grid)
    yield from _room(grid)
    text = (
        f"λ_c stays below the falling 2/η of a warm-up ({PAPER}, Sec. 4), first seed: share of "
        "measurements"
    )
    for case, pair in PAIRS.items():
        yield text, case, np.mean(np.array(in_ramps(grid, *pair)) <= 1.0), 0.8, 1.0
    text = "and the higher the target, the lower λ_c after it, first seed: highest / lowest"
    for case, pair in PAIRS.items():
        ends = largest(grid, *pair, 64), targets(grid, *pair)[0]
        high, low = (after(grid, *pair, 64, target) for target in ends)
        yield text, case, high / low, 0.0, 0.5
    yield from _saving(cells)
    yield from _gi_adam(runs, grid)


def _starts(runs: training.Runs, grid: Grid) -> training.Found:
    text = (
        f"λ_max falls from a sharp start, rises from a flat one ({PAPER}, Sec. 4), first seed: at "
        "step 96 / 24"
    )
    for model, lowest, highest in (
        ("digits-sharp", 0.0, 0.95), ("digits-flat", 1.0, np.inf), ("gpt", 1.0, np.inf)
    ):  # fmt: skip
        seen = natural(runs, model, "sgd")
        yield text, TITLES[model], seen[-1] / seen[0], lowest, highest
    text = "a GPT's first η_c is above all rates that train (ours): smallest η_c / largest rate"
    for optimizer in ("sgd", "adam"):
        critical = min(first_critical(runs, "gpt", optimizer))
        trains = max(largest(grid, "gpt", optimizer, warmup) for warmup in warmups(grid))
        yield text, NAMES[optimizer], critical / trains, 1.0, np.inf


def _room(grid: Grid) -> training.Found:
    on = {case: pair for case, pair in PAIRS.items() if pair[0] != "gpt"}
    gpt = {case: pair for case, pair in PAIRS.items() if pair[0] == "gpt"}
    text = f"a long warm-up trains at larger target rates ({PAPER}, Sec. 4): largest with / without"
    for case, pair in on.items():
        yield text, case, room(grid, *pair), 1.5, np.inf
    text = "on the GPT it does not (the paper: it does): the same"
    for case, pair in gpt.items():
        yield text, case, room(grid, *pair), 0.25, 1.5
    text = "and lowers the best final loss there, a little (ours): with / without"
    for case, pair in gpt.items():
        losses = [final(grid, *pair, w, best(grid, *pair, w)) for w in (128, 1)]
        yield text, case, losses[0] / losses[1], 0.0, 0.99
    text = "a warm-up changes little at the lowest target rate: final loss with 64 steps / without"
    odd = ("digits-sharp", "adam")
    for case, pair in PAIRS.items():
        if pair != odd:
            yield text, case, at_lowest(grid, *pair), 0.8, 1.25
    text = "but for Adam from a sharp start (the paper: little)"
    yield text, "digits, sharp start, Adam", at_lowest(grid, *odd), 1.25, 2.0
    sgd, adam = (
        room(grid, "digits-sharp", o) / room(grid, "digits-flat", o) for o in ("sgd", "adam")
    )
    text = f"it gains more from a sharp start than a flat one ({PAPER}, Sec. 4): ratio of gains"
    yield text, "SGD", sgd, 1.5, np.inf
    text = "but not under Adam (the paper: it does): the same"
    yield text, "Adam", adam, 0.67, 1.5


def _saving(cells: list[Cell]) -> training.Found:
    cut, same = (
        {o: criterion.outcome((c for c in cells if c.optimizer == o), w) for o in ("sgd", "adam")}
        for w in ("cut", "same")
    )
    text = (
        f"to begin at η_c does not save steps at equal final loss in nine of ten cells ({PAPER}, "
        "Sec. 6: it does): share"
    )
    for optimizer, found in cut.items():
        case = f"{NAMES[optimizer]}, {found.cells} cells"
        yield text, case, found.save / found.cells, 0.0, 0.89
    text = "nor warm-up steps alone, in trainings as long as the plain ones: share of all cells"
    for optimizer, found in same.items():
        yield text, NAMES[optimizer], found.save / found.cells, 0.0, 0.89
    text = "on digits these do save where there is a step to save: share"
    on_digits = {
        case: criterion.outcome((c for c in cells if (c.model, c.optimizer) == pair), "same")
        for case, pair in PAIRS.items()
        if pair[0] != "gpt"
    }
    for case, found in on_digits.items():
        yield text, case, found.save / (found.cells - found.nothing), 0.75, 1.0
    text = "none of these diverges where the plain one trains: cells lost"
    for case, found in on_digits.items():
        yield text, case, found.lost, 0, 0


def _gi_adam(runs: training.Runs, grid: Grid) -> training.Found:
    text = f"GI-Adam begins where λ_c is lower ({PAPER}, Sec. 6): λ_c of its first update / Adam's"
    for model in MODELS:
        adam, gi_adam = (first_critical(runs, model, o)[0] for o in ("adam", "gi-adam"))
        yield text, TITLES[model], adam / gi_adam, 0.0, 0.5
    text = f"and takes larger rates without a warm-up ({PAPER}): final loss at η = {HIGH} / Adam's"
    yield text, TITLES["digits-sharp"], high_rate(grid, "digits-sharp"), 0.0, 0.6
    text = "but not elsewhere (the paper: it does): the same"
    for model in ("digits-flat", "gpt"):
        yield text, TITLES[model], high_rate(grid, model), 0.8, 1.15
    text = "its lowest loss is lower, or much the same (the paper: lower): over Adam's lowest"
    for model, lowest, highest in (("digits-flat", 0.8, 1.0), ("gpt", 0.95, 1.05)):
        yield text, TITLES[model], lowest_loss(grid, model), lowest, highest
    text = "but not from the sharp start (the paper: it is): the same"
    yield text, TITLES["digits-sharp"], lowest_loss(grid, "digits-sharp"), 1.0, 1.6


def first_critical(runs: training.Runs, model: str, optimizer: str) -> list[float]:
    """η_c of the first update on several batches."""
    rows = runs[f"start-{model}-{optimizer}"]
    return [row["critical_lr"] for row in rows if row["iteration"] == 0]


def at_lowest(grid: Grid, model: str, optimizer: str) -> float:
    """Final loss with a warm-up of 64 steps over that without, at the lowest target rate."""
    lowest = targets(grid, model, optimizer)[0]
    with_it, without = (final(grid, model, optimizer, w, lowest) for w in (64, 1))
    return with_it / without


def natural(runs: training.Runs, model: str, optimizer: str) -> list[float]:
    """The exact curvature along steps at a low rate."""
    field = "hessian_sharpness" if optimizer == "sgd" else "preconditioned_sharpness"
    return [row[field] for row in runs[f"start-{model}-{optimizer}"] if field in row]


def grid_of(cells: Iterable[Cell]) -> Grid:
    """By model, optimizer, length of warm-up and target rate."""
    return {(cell.model, cell.optimizer, cell.warmup, cell.target): cell for cell in cells}


def warmups(grid: Grid) -> list[int]:
    return sorted({warmup for _, _, warmup, _ in grid})


def targets(grid: Grid, model: str, optimizer: str) -> list[float]:
    return sorted({key[3] for key in grid if key[:2] == (model, optimizer)})


def largest(grid: Grid, model: str, optimizer: str, warmup: int) -> float:
    """The largest target rate that trains with most seeds."""
    rates = targets(grid, model, optimizer)
    return max(rate for rate in rates if mostly_trains(grid[model, optimizer, warmup, rate]))


def best(grid: Grid, model: str, optimizer: str, warmup: int) -> float:
    """The target rate of the lowest final loss."""
    rates = targets(grid, model, optimizer)
    return min(rates, key=lambda rate: final(grid, model, optimizer, warmup, rate))


def room(grid: Grid, model: str, optimizer: str) -> float:
    """The largest target rate with the longest warm-up over that without."""
    none, *_, longest = warmups(grid)
    with_it, without = (largest(grid, model, optimizer, w) for w in (longest, none))
    return with_it / without


def high_rate(grid: Grid, model: str) -> float:
    """Final loss of GI-Adam without a warm-up at a high rate, over Adam's."""
    return final(grid, model, "gi-adam", 1, HIGH) / final(grid, model, "adam", 1, HIGH)


def lowest_loss(grid: Grid, model: str) -> float:
    """Final loss of GI-Adam without a warm-up at its best target rate, over Adam's at its own."""
    own, adam = (final(grid, model, o, 1, best(grid, model, o, 1)) for o in ("gi-adam", "adam"))
    return own / adam


def final(grid: Grid, model: str, optimizer: str, warmup: int, target: float) -> float:
    return typical(grid[model, optimizer, warmup, target])


def typical(cell: Cell) -> float:
    """Median final loss over the seeds: at the largest rates single trainings diverge, and which
    do turns with the rounding of a CPU."""
    return float(np.median(cell.losses("plain")))


def mostly_trains(cell: Cell) -> bool:
    return typical(cell) < cell.bound


def in_ramps(grid: Grid, model: str, optimizer: str) -> list[float]:
    """η/η_c at every measurement in the warm-ups of the trainings that train."""
    return [
        ratio
        for cell in grid.values()
        if (cell.model, cell.optimizer) == (model, optimizer)
        if cell.warmup > 1 and mostly_trains(cell)
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
