"""``python -m experiments.mix [FIRST SECOND --out FOLDER] [--large]``: records and figure."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, training
from experiments.mix import analysis
from experiments.mix.run import (
    LARGE,
    RATES,
    SHARES,
    TRAINED,
    Setting,
    grid,
    pretrain,
    sweep,
    train_on,
)
from megatron_sharpness.sweeps.mix.figure import draw_sweep

FOLDER = Path(__file__).parent
STEPS_SHOWN = 100


def draw(runs: analysis.Runs, path: Path, names: dict[str, str]) -> None:
    """λ against the share; the change of both losses over the grid; training on at shares."""
    with figures.figure(path, 2, 2, height=4.0) as axes:
        sweep = {
            share: {names[task]: values for task, values in tasks.items()}
            for share, tasks in analysis.sweep_of(runs).items()
        }
        draw_sweep(axes[0][0], sweep, analysis.advice_of(runs), names["first"])
        axes[0][0].set_title(r"$\lambda_c^{1\to 2}$")
        axes[0][0].legend(frameon=False, fontsize="small")
        _draw_runs(axes[0][1], runs, names)
        for axis, task in zip(axes[1], analysis.TASKS, strict=True):
            _draw_grid(axis, runs, task, names[task])


def _draw_grid(axis: Any, runs: analysis.Runs, task: str, name: str) -> None:
    cells = analysis.changes(runs, task, STEPS_SHOWN)
    values = np.array([[cells[share, lr] for share in TRAINED] for lr in RATES])
    limit = float(np.median(np.abs(values))) * 2
    image = axis.pcolormesh(
        range(len(TRAINED)), np.log10(RATES), values, cmap="RdBu_r", vmin=-limit, vmax=limit,
        shading="nearest",
    )  # fmt: skip
    rates = analysis.predicted_rates(runs)
    line = [np.log10(max(rates[share][task], 1e-6)) for share in TRAINED]
    axis.plot(range(len(TRAINED)), line, "k-", linewidth=2)
    axis.plot(range(len(TRAINED)), line, "wo", markersize=4, markeredgecolor="k")
    axis.set_ylim(np.log10(RATES[0]) - 0.15, np.log10(RATES[-1]) + 0.15)
    axis.set_xticks(range(len(TRAINED)), [f"{share:g}" for share in TRAINED])
    axis.set_yticks([-4, -3, -2], ["1e-4", "1e-3", "1e-2"])
    axis.grid(False)
    axis.set_xlabel("share in training on")
    axis.set_ylabel(r"$\eta$")
    axis.set_title(f"{name}: ΔL, {STEPS_SHOWN} steps")
    axis.figure.colorbar(image, ax=axis, extend="both")


def _draw_runs(axis: Any, runs: analysis.Runs, names: dict[str, str]) -> None:
    losses = analysis.last_losses(runs)
    fixed = {name: pair for name, pair in losses.items() if name.startswith("fixed-")}
    axis.plot(*zip(*fixed.values(), strict=True), "o-", color=figures.MUTED, label="fixed share")
    for name, pair in fixed.items():
        axis.annotate(
            name.removeprefix("fixed-"), pair, xytext=(5, 4), textcoords="offset points",
            color=figures.MUTED,
        )  # fmt: skip
    for name, color in zip(
        [name for name in losses if name.startswith("adaptive-")],
        (figures.GREEN, figures.PURPLE),
        strict=True,
    ):
        start, end = runs[name][0]["share"], runs[name][-1]["share"]
        axis.plot(*losses[name], "*", color=color, markersize=13, label=f"{start:g} → {end:.2f}")
    axis.set_xlabel(f"held-out loss, {names['first']}")
    axis.set_title(f"held-out loss, {names['second']}")
    axis.legend(frameon=False, fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes records and figure.")
    parser.add_argument("domains", nargs="*", default=["prose", "code"], metavar="DOMAIN")
    parser.add_argument("--names", nargs=2, default=["prose", "code"])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--large", action="store_true", help="for a GPU, one process after another")
    arguments = parser.parse_args()
    setting, processes = (LARGE, 1) if arguments.large else (Setting(), None)
    first, second = arguments.domains
    setting = dataclasses.replace(setting, first=first, second=second)
    names = dict(zip(analysis.TASKS, arguments.names, strict=True))
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = arguments.out / "base.pt"

    runs = training.in_parallel(pretrain, {"base": (setting, base)}, processes)
    measured = {f"sweep-{share:g}": (setting, base, share) for share in SHARES}
    runs |= training.in_parallel(sweep, measured, processes)
    trained = {f"grid-{share:g}": (setting, base, share) for share in TRAINED}
    runs |= training.in_parallel(grid, trained, processes)
    lr = analysis.advice_of(runs).lr
    further = {f"fixed-{share:g}": (setting, base, share, lr, False) for share in TRAINED}
    further |= {f"adaptive-{share:g}": (setting, base, share, lr, True) for share in (0.2, 1.0)}
    runs |= training.in_parallel(train_on, further, processes)
    base.unlink()
    training.write(arguments.out, runs)
    draw(runs, arguments.out / "figure.png", names)
    print(analysis.tables(runs, names))


if __name__ == "__main__":
    main()
