"""``python -m experiments.phase_diagram``: the diagrams and the regimes; three minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, training
from experiments.phase_diagram import analysis
from experiments.phase_diagram.run import (
    EARLY,
    EVERY_THIRD,
    LARGE_SEEDS,
    LARGE_WIDTHS,
    NETWORKS,
    REGIME_SEEDS,
    SEEDS,
    WIDTHS,
    Cell,
    regimes,
    run,
)
from megatron_sharpness.report.curves import STAGE_COLORS

FOLDER = Path(__file__).parent
PHASES = {
    analysis.FALLS: ("both fall", "#BFDDF0"),
    analysis.LOSS_RISES: ("loss rises", "#F8DFA5"),
    analysis.SHARPNESS_RISES: (r"$\lambda_{max}$ rises, too", "#F0B48C"),
    analysis.DIVERGES: ("diverges", "#BBBBBB"),
}
LINES = {
    "loss": (r"$c_{loss}$", figures.BLUE, "o"),
    "sharpness": (r"$c_{sharp}$", figures.VERMILION, "s"),
    "largest": (r"$c_{max}$", "black", "^"),
    "of_first_step": (r"$2\lambda_{max}/\lambda_c$ at first", figures.PURPLE, "x"),
}
COLORS = dict(zip(NETWORKS, (figures.BLUE, figures.GREEN, figures.ORANGE), strict=True))
#: The network whose first ten steps are drawn, and at which c.
SHOWN = Cell("relu", 4, 256, 0)
SHOWN_AT = {2.0: figures.GREEN, 4.0: figures.BLUE, 8.0: figures.VERMILION}


def diagram(axis: Any, rows: list[training.Row]) -> None:
    """What happened over c and d/w, in the median over the seeds, and the critical c's."""
    found = analysis.critical_values(rows)
    seeds = len({each.cell.seed for each in found})
    happened: dict[tuple[float, float], list[int]] = {}
    for row in rows:
        at = row["depth"] / row["width"], row["c"]
        happened.setdefault(at, []).append(analysis.phase(row))
    axis.set_facecolor(PHASES[analysis.DIVERGES][1])  # beyond the last c of each network, too
    for (ratio, c), phases in happened.items():
        phases += [analysis.DIVERGES] * (seeds - len(phases))
        around = c * 2 ** np.array([-1 / 8, 1 / 8])
        color = PHASES[int(np.median(phases))][1]
        axis.fill_between(around, ratio / 2**0.5, ratio * 2**0.5, color=color, linewidth=0)
    for attribute, (label, color, marker) in LINES.items():
        values = analysis.medians(found, attribute)
        style = {"color": color, "marker": marker, "label": label}
        axis.plot(list(values.values()), list(values), **style)
    axis.axvline(2.0, color=figures.MUTED, linewidth=1.1, linestyle=(0, (4, 2)))
    ends = (
        min(ratio for ratio, _ in happened) / 2**0.5,
        max(ratio for ratio, _ in happened) * 2**0.5,
    )
    axis.set(ylim=ends, xlim=(2 ** (3 / 8), 2**6.9), xlabel=r"$c=\eta\lambda_0^H$")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.grid(False)


def first_step(axis: Any, runs: training.Runs) -> None:
    """c_loss of each network beside the c from which on the first step raises the loss."""
    for (activation, depth), color in COLORS.items():
        found = analysis.critical_values(runs[f"{activation}-{depth}"])
        x, y = ([getattr(each, field) for each in found] for field in ("of_first_step", "loss"))
        style = {"color": color, "marker": "o", "linestyle": "none"}
        axis.plot(x, y, label=analysis.name(activation, depth), **style)
    ends = [2, 192]
    axis.plot(ends, ends, color=figures.MUTED, linewidth=1.1)
    axis.plot(ends, [2, 2], color=figures.MUTED, linewidth=1.1, linestyle=(0, (4, 2)))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set(xlabel=r"$2\lambda_{max}/\lambda_c$ at initialization", ylabel=r"$c_{loss}$")
    axis.legend(frameon=False)


def ten_steps(axis: Any, rows: list[training.Row]) -> None:
    """λ_max and λ_c of one network at three learning rates."""
    (own,) = (own for cell, own in analysis.networks(rows) if cell == SHOWN)
    for row in own:
        if color := SHOWN_AT.get(row["c"]):
            label = f"c = {row['c']:g}"
            axis.plot(row["hessian_sharpness"], color=color, label=label)
            style = {"color": color, "linestyle": (0, (4, 1.5))}
            axis.plot(range(0, EARLY, EVERY_THIRD), analysis.beside(row)[1], marker="o", **style)
    axis.plot([], color=figures.MUTED, label=r"$\lambda_{max}$")
    axis.plot([], color=figures.MUTED, label=r"$\lambda_c$", linestyle=(0, (4, 1.5)))
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.legend(frameon=False, ncols=2)


def in_time(axis: Any, rows: list[training.Row]) -> None:
    """λ_c and λ_max of a long run over the stages that the report names."""
    for stage in analysis.stages(rows):
        span = {"color": STAGE_COLORS[stage.name], "linewidth": 0}
        axis.axvspan(stage.first - 0.5, stage.last + 0.5, **span)
    figures.curves(axis, rows, ["critical_sharpness", "hessian_sharpness", "edge_of_stability"])
    named = dict.fromkeys(stage.name for stage in analysis.stages(rows))
    for name in named:
        axis.fill_between([], [], color=STAGE_COLORS[name], label=name)
    axis.set(xscale="log", yscale="log", xlabel="step", xlim=(0.9, None))
    axis.set_ylim(bottom=2e-5)
    axis.legend(loc="lower center", fontsize=9, ncols=2, framealpha=1.0)


def draw(runs: dict[str, list[training.Row]]) -> None:
    with figures.figure(FOLDER / "figure.png", 2, 3, height=4.2) as axes:
        for axis, (activation, depth) in zip(axes[0], NETWORKS, strict=True):
            axis.set_title(analysis.name(activation, depth))
            diagram(axis, runs[f"{activation}-{depth}"])
        axes[0][0].set_ylabel("layers / width")
        for color, label in ((color, label) for label, color in PHASES.values()):
            axes[0][2].fill_between([], [], color=color, label=label)
        axes[0][2].legend()
        axes[1][0].set_title("Where the loss rises at first")
        first_step(axes[1][0], runs)
        axes[1][1].set_title(f"ReLU, {SHOWN.depth} layers, width {SHOWN.width}")
        ten_steps(axes[1][1], runs[f"{SHOWN.activation}-{SHOWN.depth}"])
        axes[1][2].set_title("The four regimes in time")
        in_time(axes[1][2], runs["regimes-0"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true", help="widths to 1024, ten seeds")
    large = parser.parse_args().large
    widths, seeds = (LARGE_WIDTHS + WIDTHS, LARGE_SEEDS) if large else (WIDTHS, SEEDS)
    cells = [
        Cell(*network, width, seed) for width in widths for network in NETWORKS for seed in seeds
    ]
    trained = training.in_parallel(run, {str(cell): (cell,) for cell in cells})
    found: dict[str, list[training.Row]] = {}
    for cell in cells:
        found.setdefault(f"{cell.activation}-{cell.depth}", []).extend(trained[str(cell)])
    found |= training.in_parallel(regimes, {f"regimes-{seed}": (seed,) for seed in REGIME_SEEDS})
    training.write(FOLDER, found)
    draw(found)


if __name__ == "__main__":
    main()
