"""The curves of one run, or of several over each other, in one picture."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.measurement import MISSED
from megatron_sharpness.report.records import Array, Record, Run, column
from megatron_sharpness.report.stages import smoothed

# Okabe and Ito's blue, vermilion and green: told apart by colour-blind readers too
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#00795C"
INK, MUTED, GRID = "#222222", "#666666", "#E8E8E8"
OTHER_COLORS = ("#CC79A7", "#00795C", "#8A6D00", "#56B4E9", "#666666")  # and again
PART_COLORS = (VERMILION, *OTHER_COLORS, "#000000", "#E69F00")  # and again
RUN_COLORS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # and again
FONT_SIZE = 12

STYLE = {
    "font.size": FONT_SIZE,
    "mathtext.fontset": "dejavusans",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.01,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
MISSED_MARKERS = dict(zip(MISSED, "x^sDvP*o+", strict=True))
WIDTH, MARK = 110, 8  # letters that fit into a line of the legend, and the mark before a name
LOGARITHMIC_FROM = 10.0  # largest over smallest loss of an overlay
DOTTED_UP_TO = 120  # measurements; more of them are a line without dots


def draw(runs: list[Run], path: Path, *, preconditioned: bool = False) -> None:
    """Draw the measurements into ``path``, a PNG.

    One run, 1600 × 1400 pixels, from top to bottom: critical sharpness λ_c = 2/η_c (Definition
    2.1) with the edge of stability 2/η − γ and its pre-conditioned twin (Result 3.1); the critical
    learning rate η_c with its bracket, beside the learning rate η; the loss.

    Several runs, 1600 × 2200 pixels, one colour a run: λ_c with its line, and its pre-conditioned
    twin where ``preconditioned`` asks for it, η/η_c, both as running medians among faint dots for
    the measurements themselves, η, the loss, and what a measurement costs in forward passes and in
    seconds.

    Where parts of the model were measured, one run has η/η_c of each part's update alone, too.

    Measured on other data too, one run has its λ_c^{1→2} in the first panel, a triangle at the top
    where that loss rises at once.

    A measurement that found no η_c is marked at the lower axis of the first panel by its status.

    Raises:
        InputError: ``path`` cannot be written, or matplotlib is missing.
    """
    height = (11.5 if runs[0].parts else 8.75) if len(runs) == 1 else 13.75
    with png(path, (10, height)) as figure:
        if len(runs) == 1:
            _draw_run(figure, runs[0])
        else:
            _draw_overlay(figure, runs, preconditioned)


@contextlib.contextmanager
def png(path: Path, size: tuple[float, float], **options: Any) -> Iterator[Any]:
    """A figure of this size in inches, which is saved in the end.

    Raises:
        InputError: ``path`` cannot be written, or matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError(
            f"--out {path}: a .png needs matplotlib ({error}); pip install matplotlib"
        ) from error
    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=160, **options)
        yield figure
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise InputError(f"--out {path}: cannot be written ({error})") from error


def _draw_run(figure: Any, run: Run) -> None:
    ratios = [1.3, 1.3, *[1.3] * bool(run.parts), 1]
    sharpness, rate, *parts, loss = figure.subplots(
        len(ratios), 1, sharex=True, height_ratios=ratios
    )
    figure.subplots_adjust(left=0.08, right=0.83, top=0.955, bottom=0.065, hspace=0.23)
    _draw_panels(sharpness, rate, loss, run)
    for axes in parts:
        _draw_parts(axes, run)
    _mark_missed(sharpness, run.records)
    _name_missed(sharpness, run.records)
    figure.draw_without_rendering()  # settles the limits that the labels stand by
    for axes in figure.axes:
        _label_ends(axes)


def _draw_panels(sharpness: Any, rate: Any, loss: Any, run: Run) -> None:
    iteration = run.column("iteration")
    dots = {"marker": "o"} if len(iteration) <= DOTTED_UP_TO else {}

    sharpness.set_title("Critical sharpness")
    sharpness.set_yscale("log")
    _curve(
        sharpness,
        iteration,
        run.column("edge_of_stability_preconditioned"),
        "pre-conditioned\nedge of stability",
        color=VERMILION,
        linewidth=1.5,
        linestyle=(0, (4, 2)),
    )
    edge = run.column("edge_of_stability")
    _curve(sharpness, iteration, edge, "edge of stability\n$2/\\eta-\\gamma$", color=VERMILION)
    critical_sharpness = run.column("critical_sharpness")
    _curve(sharpness, iteration, critical_sharpness, r"$\lambda_c=2/\eta_c$", color=BLUE, **dots)
    _draw_others(sharpness, run)

    rate.set_title("Critical learning rate")
    rate.set_yscale("log")
    lower, upper = (run.column(f"critical_lr_{end}") for end in ("lower", "upper"))
    rate.fill_between(iteration, lower, upper, color=BLUE, alpha=0.25, linewidth=0)
    critical_lr = run.column("critical_lr")
    _curve(rate, iteration, critical_lr, "$\\eta_c$ and its bracket", color=BLUE, **dots)
    lr, logged_loss = run.curve("lr"), run.curve("loss")
    _curve(rate, lr.iteration, lr.values, "learning rate $\\eta$", color=VERMILION)

    loss.set_title("Loss")
    loss.set_xlabel("iteration")
    _curve(loss, logged_loss.iteration, logged_loss.values, r"$L(\theta)$", color=GREEN)


def _draw_others(axes: Any, run: Run) -> None:
    """λ_c^{1→2} of other data; where its loss rises at once it is ∞, a triangle at the top."""
    curves = {name: column(records, "critical_sharpness") for name, records in run.others.items()}
    top = 2.0 * max((np.nanmax(v) for v in curves.values() if np.isfinite(v).any()), default=1.0)
    for (name, values), color in zip(curves.items(), itertools.cycle(OTHER_COLORS)):
        records = run.others[name]
        iteration = column(records, "iteration")
        label = f"{name}, $\\lambda_c^{{1\\to 2}}$"
        _curve(axes, iteration, values, label, color=color, linewidth=1.4)
        at_once = np.array([record["status"] == "not_descent" for record in records])
        axes.plot(
            iteration[at_once], np.full(at_once.sum(), top), color=color, marker="^",
            linestyle="None",
        )  # fmt: skip


def _draw_parts(axes: Any, run: Run) -> None:
    """η/η_c of each part's update alone, and of the whole update."""
    axes.set_title("Learning rate over critical, of each part alone")
    axes.set_yscale("log")
    whole = run.column("lr_over_critical")
    _curve(axes, run.column("iteration"), whole, r"whole, $\eta/\eta_c$", color=BLUE, linewidth=2.2)
    for (name, records), color in zip(run.parts.items(), itertools.cycle(PART_COLORS)):
        iteration, ratio = column(records, "iteration"), column(records, "lr_over_critical")
        _curve(axes, iteration, ratio, name, color=color, linewidth=1.4)
    ends = run.column("iteration")[[0, -1]]
    edge = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (4, 2))}
    _curve(axes, ends, np.ones(2), r"$\eta=\eta_c$", **edge)


def _draw_overlay(figure: Any, runs: list[Run], preconditioned: bool) -> None:
    from matplotlib.lines import Line2D

    panels = figure.subplot_mosaic(
        [["sharpness"] * 2, ["ratio"] * 2, ["rate"] * 2, ["loss"] * 2, ["evaluations", "seconds"]],
        height_ratios=[1.7, 1.2, 1, 1.2, 0.8],
    )
    colors = [RUN_COLORS[number % len(RUN_COLORS)] for number in range(len(runs))]
    dashes: dict[str, Any] = {"edge_of_stability": (0, (5, 2))}
    kinds = ["$\\lambda_c=2/\\eta_c$, running median", "edge of stability $2/\\eta-\\gamma$"]
    if preconditioned:
        dashes["edge_of_stability_preconditioned"] = (0, (1, 1.5))
        kinds.append("pre-conditioned edge")
    longest = max(len(run.name) for run in runs)
    columns, row = min(4, len(runs), max(1, WIDTH // (longest + MARK))), 0.02
    names_height = row * -(-len(runs) // columns)
    for labels, handles, y, ncols in (
        (
            [run.name.replace("$", r"\$") for run in runs],
            [Line2D([], [], color=c) for c in colors],
            0.998,
            columns,
        ),
        (
            kinds,
            [Line2D([], [], color=MUTED, linestyle=dash) for dash in ("-", *dashes.values())],
            0.998 - names_height,
            len(kinds),
        ),
    ):
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.07, y), ncols=ncols, frameon=False
        )
    figure.subplots_adjust(
        left=0.08, right=0.975, top=0.935 - names_height, bottom=0.045, hspace=0.34, wspace=0.16
    )
    titles = {
        "sharpness": "Critical sharpness",
        "ratio": "Learning rate over critical learning rate, $\\eta/\\eta_c$",
        "rate": "Learning rate $\\eta$",
        "loss": "Loss",
        "evaluations": "Forward passes a measurement",
        "seconds": "Seconds a measurement",
    }
    for name, axes in panels.items():
        axes.set_title(titles[name])
        if name in ("sharpness", "ratio", "rate") or (name == "loss" and losses_far_apart(runs)):
            axes.set_yscale("log")
        if name != "sharpness":
            axes.sharex(panels["sharpness"])
        if name in ("evaluations", "seconds"):
            axes.set_xlabel("iteration")
        elif name != "loss":
            axes.tick_params(labelbottom=False)

    panels["ratio"].axhline(1, color=MUTED, linewidth=1.2)
    for number, (run, color) in enumerate(zip(runs, colors, strict=True)):
        iteration = run.column("iteration")
        dots = {"marker": "o"} if len(iteration) <= DOTTED_UP_TO else {}
        for field, dash in dashes.items():
            _curve(
                panels["sharpness"],
                iteration,
                run.column(field),
                run.name,
                color=color,
                linewidth=1.2,
                linestyle=dash,
            )
        for name, field in (("sharpness", "critical_sharpness"), ("ratio", "lr_over_critical")):
            values = run.column(field)
            scattered = {"color": color, "marker": ".", "linestyle": "none", "alpha": 0.3}
            _curve(panels[name], iteration, values, run.name, **scattered)
            _curve(panels[name], iteration, smoothed(values), run.name, color=color)
        for name in ("evaluations", "seconds"):
            _curve(panels[name], iteration, run.column(name), run.name, color=color, **dots)
        for name, logged in (("rate", run.curve("lr")), ("loss", run.curve("loss"))):
            _curve(panels[name], logged.iteration, logged.values, run.name, color=color)
        _mark_missed(panels["sharpness"], run.records, color, height=0.035 * number)
    _name_missed(panels["sharpness"], [record for run in runs for record in run.records])
    for name in ("evaluations", "seconds"):
        panels[name].set_ylim(bottom=0)


def losses_far_apart(runs: list[Run]) -> bool:
    """Whether a logarithmic axis is needed to see all losses: one has diverged, or vanishes."""
    values = np.concatenate([run.curve("loss").values for run in runs])
    values = values[np.isfinite(values)]
    return bool(len(values)) and np.max(values) > LOGARITHMIC_FROM * np.min(values) > 0.0


def _curve(axes: Any, x: Array, y: Array, label: str, **style: Any) -> None:
    """Plot what there is of a curve; a logarithmic axis has no place for what is not positive."""
    if axes.get_yscale() == "log":
        y = np.where(y > 0, y, np.nan)
    there = np.isfinite(y)
    if there.any():
        axes.plot(x, y, label=label, **style)
        neighbours = np.concatenate(([False], there, [False]))
        alone = there & ~neighbours[:-2] & ~neighbours[2:]  # no line leads to it
        if alone.any():
            axes.plot(x[alone], y[alone], color=style["color"], marker="o", linestyle="none")


def _mark_missed(axes: Any, records: list[Record], color: str = INK, height: float = 0.0) -> None:
    """A mark for every measurement without a number, one shape a status.

    They stand on the lower axis, or above it by ``height``, a share of the panel's.
    """
    for status, number in _count_missed(records).items():
        at = [record["iteration"] for record in records if record["status"] == status]
        axes.plot(
            at,
            np.full(len(at), height),
            transform=axes.get_xaxis_transform(),
            color=color,
            clip_on=False,
            zorder=3,
            label=f"{status} ({number})",
            **_missed_style(status),
        )


def _name_missed(axes: Any, records: list[Record]) -> None:
    """What the marks of :func:`_mark_missed` mean, and how many there are.

    It stands above the panel, beside its title; more than fits there is inside.
    """
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=INK, label=f"{status} ({number})", **_missed_style(status))
        for status, number in _count_missed(records).items()
    ]
    if marks:
        beside_title = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.98), "frameon": False}
        axes.legend(
            handles=marks,
            ncols=3,
            handletextpad=0.1,
            fontsize=11,
            **beside_title if len(marks) <= 3 else {"loc": "best"},
        )


def _count_missed(records: list[Record]) -> Counter[str]:
    return Counter(record["status"] for record in records if record["status"] in MISSED)


def _missed_style(status: str) -> dict[str, Any]:
    return {
        "linestyle": "none",
        "marker": MISSED_MARKERS[status],
        "markersize": 8,
        "markeredgewidth": 1.8,
        "markerfacecolor": "white",
    }


def _label_ends(axes: Any) -> None:
    """Write the curves' names to the right of their ends, moved apart where they would collide."""
    bottom, top = axes.bbox.y0, axes.bbox.y1
    line_height = 1.3 * FONT_SIZE * axes.figure.dpi / 72
    ends = []
    for line in axes.get_lines():
        if line.get_linestyle() != "None":
            y = line.get_ydata()
            ends.append((axes.transData.transform((0, y[np.isfinite(y)][-1]))[1], line))
    free = bottom  # the lowest pixel that no label has taken
    for y, line in sorted(ends, key=lambda end: end[0]):
        label = line.get_label()
        height = line_height * (1 + label.count("\n"))
        middle = max(min(y, top - height / 2), free + height / 2)
        free = middle + height / 2
        axes.annotate(
            label,
            (1.015, (middle - bottom) / (top - bottom)),
            xycoords="axes fraction",
            va="center",
            color=line.get_color(),
        )
