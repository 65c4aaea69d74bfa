"""The two figures of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, training
from experiments.warmup import criterion
from experiments.warmup.claims import (
    NAMES,
    TITLES,
    Grid,
    grid_of,
    mostly_trains,
    targets,
    typical,
    warmups,
)
from experiments.warmup.run import EVERY, MODELS

MODEL_COLORS = dict(zip(MODELS, (figures.VERMILION, figures.BLUE, figures.GREEN), strict=True))
#: Of the lengths of warm-up, from none on.
LENGTH_COLORS = (figures.VERMILION, figures.ORANGE, figures.PURPLE, figures.BLUE)
#: Target rates whose λ_c is drawn: with a warm-up they train; without it less well, or not at all.
FOLLOWED = {"sgd": {"digits": 0.32, "gpt": 0.3}, "adam": {"digits": 0.064, "gpt": 0.016}}


def draw(path: Path, runs: training.Runs) -> None:
    """The grid of final losses, and λ_c along some of the trainings."""
    grid = grid_of(criterion.cells(runs))
    with figures.figure(path, len(MODELS), 4, height=3.3) as axes:
        for row, model in zip(axes, MODELS, strict=True):
            for number, optimizer in enumerate(("sgd", "adam")):
                _heat(row[number], grid, model, optimizer)
                _sharpness(row[2 + number], grid, model, optimizer)
        axes[0][2].legend(frameon=False, fontsize=9)


def _heat(axes: Any, grid: Grid, model: str, optimizer: str) -> None:
    """Median final losses; crossed out where most seeds do not train."""
    rates, lengths = targets(grid, model, optimizer), warmups(grid)
    cells = [[grid[model, optimizer, length, rate] for length in lengths] for rate in rates]
    losses = np.array(
        [[typical(cell) if mostly_trains(cell) else np.nan for cell in row] for row in cells]
    )
    axes.imshow(np.log(losses), origin="lower", aspect="auto", cmap="viridis_r")
    middle = np.nanmean(np.log(losses))
    for (y, x), loss in np.ndenumerate(losses):
        text = f"{loss:.2g}" if loss < 1 else f"{loss:.2f}"
        color = "white" if np.log(loss) > middle else "black"
        style = {"ha": "center", "va": "center", "fontsize": 9}
        if np.isnan(loss):
            axes.text(x, y, "×", color=figures.VERMILION, **style | {"fontsize": 15})
        else:
            axes.text(x, y, text, color=color, **style)
    axes.grid(False)
    axes.set_xticks(range(len(lengths)), ["none", *map(str, lengths[1:])])
    axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_title(f"{TITLES[model]}, {NAMES[optimizer]}")
    axes.set_xlabel("steps of warm-up")
    axes.set_ylabel("target rate")


def _sharpness(axes: Any, grid: Grid, model: str, optimizer: str) -> None:
    """λ_c, and 2/η dashed, of the first seed at one target rate."""
    target = FOLLOWED[optimizer][model.split("-")[0]]
    none, *lengths = warmups(grid)
    for length, color in zip((none, *lengths), LENGTH_COLORS, strict=False):
        found = grid[model, optimizer, length, target].rows[0]["lr_over_critical"]
        ratios = np.array([np.nan if ratio is None else ratio for ratio in found])
        steps = EVERY * np.arange(1, len(ratios) + 1)
        edge = 2.0 / (target * np.minimum(1.0, steps / length))
        label = "no warm-up" if length == none else f"{length} steps"
        axes.plot(steps, ratios * edge, color=color, label=label)
        axes.plot(steps, edge, color=color, linewidth=1.1, linestyle=(0, (4, 2)))
    axes.set_yscale("log")
    axes.set_title(rf"{NAMES[optimizer]}, $\eta$ = {target:g}")
    axes.set_xlabel("step")
    axes.set_ylabel(r"$\lambda_c$")


def draw_savings(path: Path, runs: training.Runs) -> None:
    """What it saves and costs to begin at η_c, and Adam beside GI-Adam."""
    cells = criterion.cells(runs)
    with figures.figure(path, 1, 3, height=4.2) as ((*savings, initial),):
        for axes, optimizer in zip(savings, ("sgd", "adam"), strict=True):
            _savings(axes, [c for c in criterion.judged(cells) if c.optimizer == optimizer])
            axes.set_title(f"Begun at $\\eta_c$, {NAMES[optimizer]}")
        savings[0].legend(frameon=False, fontsize=9, loc="upper left")
        _gi_adam(initial, grid_of(cells))


def _savings(axes: Any, cells: list[criterion.Cell]) -> None:
    """Final loss over the plain warm-up's, against the share of the warm-up that is saved."""
    top = 2.0
    for model, color in MODEL_COLORS.items():
        axes.plot([], [], "o", color=color, label=TITLES[model])
        for cell in (c for c in cells if c.model == model and c.saved):
            ratio = np.mean(cell.losses("cut")) / np.mean(cell.losses("plain"))
            marker = "x" if cell.lost() else "o" if cell.saves() else "^"
            share = np.mean([row["saved"] for row in cell.rows]) / cell.warmup
            axes.plot(
                share, min(ratio, top), marker, color=color, markersize=6, fillstyle="none",
                clip_on=False,
            )  # fmt: skip
    for marker, label in (("o", "saves"), ("^", "a higher loss"), ("x", "lost")):
        axes.plot([], [], marker, color=figures.MUTED, fillstyle="none", label=label)
    axes.axhline(1.0, color=figures.MUTED, linewidth=1.1, linestyle=(0, (4, 2)))
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0.8, top)
    axes.set_xlabel("share of the warm-up saved")
    axes.set_ylabel("final loss / plain warm-up's")


def _gi_adam(axes: Any, grid: Grid) -> None:
    """Final losses without a warm-up."""
    none = warmups(grid)[0]
    for model, color in MODEL_COLORS.items():
        for optimizer, dashes in (("adam", (0, (4, 2))), ("gi-adam", "-")):
            rates = targets(grid, model, optimizer)
            losses = [typical(grid[model, optimizer, none, rate]) for rate in rates]
            axes.plot(rates, losses, "o", color=color, linestyle=dashes)
    for label, dashes in (("Adam", (0, (4, 2))), ("GI-Adam", "-")):
        axes.plot([], [], color=figures.MUTED, linestyle=dashes, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.03, 20)
    axes.set_title("Without a warm-up")
    axes.set_xlabel(r"$\eta$")
    axes.set_ylabel("final loss")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
