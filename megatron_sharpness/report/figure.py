"""The curves of a run in one picture: λ_c, η_c and the loss over the iterations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sharpness.errors import InputError
from megatron_sharpness.report.records import Array, Record, TrainingCurves, column

# Okabe and Ito's blue, vermilion and green: told apart by colour-blind readers too
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#00795C"
INK, MUTED, GRID = "#222222", "#666666", "#E8E8E8"
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
MISSED_MARKERS = "x^sDvP*o+"  # one a status, in order of first appearance


def draw(records: list[Record], path: Path, training: TrainingCurves | None = None) -> None:
    """Draw the measurements of one run into ``path``, a PNG of 1600 × 1400 pixels.

    From top to bottom: critical sharpness λ_c = 2/η_c (Definition 2.1) with the edge of stability
    2/η − γ and its pre-conditioned twin (Result 3.1); the critical learning rate η_c with its
    bracket, beside the learning rate η; the loss. A measurement that found no η_c is marked at
    the lower axis of the first panel by its status.

    Args:
        records: measurements by iteration, as :func:`read_records` returns them.
        path: the file to write.
        training: loss and learning rate between the measurements, where they are known.

    Raises:
        InputError: ``path`` cannot be written, or matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError(
            f"--out needs matplotlib ({error}); pip install matplotlib"
        ) from error

    with rc_context(STYLE):
        figure = Figure(figsize=(10, 8.75), dpi=160)
        sharpness, rate, loss = figure.subplots(3, 1, sharex=True, height_ratios=[1.3, 1.3, 1])
        figure.subplots_adjust(left=0.08, right=0.83, top=0.955, bottom=0.065, hspace=0.23)
        _draw_panels(sharpness, rate, loss, records, training)
        _mark_missed(sharpness, records)
        figure.draw_without_rendering()  # settles the limits that the labels stand by
        for axes in figure.axes:
            _label_ends(axes)
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise InputError(f"--out {path}: cannot be written ({error})") from error


def _draw_panels(
    sharpness: Any, rate: Any, loss: Any, records: list[Record], training: TrainingCurves | None
) -> None:
    iteration = column(records, "iteration")
    if training is None:
        training = TrainingCurves(iteration, column(records, "loss"), column(records, "lr"))
    dots = {"marker": "o"} if len(records) <= 120 else {}

    sharpness.set_title("Critical sharpness")
    sharpness.set_yscale("log")
    _curve(
        sharpness,
        iteration,
        column(records, "edge_of_stability_preconditioned"),
        "pre-conditioned\nedge of stability",
        color=VERMILION,
        linewidth=1.5,
        linestyle=(0, (4, 2)),
    )
    edge = column(records, "edge_of_stability")
    _curve(sharpness, iteration, edge, "edge of stability\n$2/\\eta-\\gamma$", color=VERMILION)
    critical_sharpness = column(records, "critical_sharpness")
    _curve(sharpness, iteration, critical_sharpness, r"$\lambda_c=2/\eta_c$", color=BLUE, **dots)

    rate.set_title("Critical learning rate")
    rate.set_yscale("log")
    lower, upper = (column(records, f"critical_lr_{end}") for end in ("lower", "upper"))
    rate.fill_between(iteration, lower, upper, color=BLUE, alpha=0.25, linewidth=0)
    critical_lr = column(records, "critical_lr")
    _curve(rate, iteration, critical_lr, "$\\eta_c$ and its bracket", color=BLUE, **dots)
    _curve(rate, training.iteration, training.lr, "learning rate $\\eta$", color=VERMILION)

    loss.set_title("Loss")
    loss.set_xlabel("iteration")
    _curve(loss, training.iteration, training.loss, r"$L(\theta)$", color=GREEN)


def _curve(axes: Any, x: Array, y: Array, label: str, **style: Any) -> None:
    """Plot what there is of a curve; a logarithmic axis has no place for what is not positive."""
    if axes.get_yscale() == "log":
        y = np.where(y > 0, y, np.nan)
    if np.isfinite(y).any():
        axes.plot(x, y, label=label, **style)


def _mark_missed(axes: Any, records: list[Record]) -> None:
    """A mark at the lower axis for every measurement without a number, one shape a status."""
    missed = [record for record in records if record["status"] != "found"]
    marks = []
    for marker, (status, number) in zip(
        MISSED_MARKERS, Counter(record["status"] for record in missed).items(), strict=False
    ):
        at = [record["iteration"] for record in missed if record["status"] == status]
        marks += axes.plot(
            at,
            np.zeros(len(at)),
            transform=axes.get_xaxis_transform(),
            linestyle="none",
            marker=marker,
            markersize=8,
            markeredgewidth=1.8,
            markerfacecolor="white",
            color=INK,
            clip_on=False,
            zorder=3,
            label=f"{status} ({number})",
        )
    if marks:
        axes.legend(
            handles=marks,
            ncols=len(marks),
            loc="lower right",
            bbox_to_anchor=(1.02, 0.98),
            frameon=False,
            handletextpad=0.1,
            fontsize=11,
        )


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
