"""λ_c of a series of checkpoints against tokens or iterations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sharpness.core.measurement import TRAIN
from megatron_sharpness.report.figure import BLUE, GREEN, RUN_COLORS, VERMILION, png
from megatron_sharpness.sweeps.bands import draw_band, limits_of
from megatron_sharpness.sweeps.checkpoints.points import OWN, Point


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw medians, the middle 68 % of the batches shaded, as a PNG.

    Where moments and learning rate are the checkpoints' own, the step that the training itself made
    is a cross, and both edges of stability and the schedule are drawn: λ_c of the training belongs
    to the solid one, and with the steps that are taken back it goes towards the dashed one's
    (experiments/checkpoints). A median of ∞ is drawn at the upper end, as a triangle.

    Raises:
        InputError: it cannot be written, or matplotlib is missing.
    """
    label, places = _places(points)
    own = [point for point in points if point.batch == TRAIN]
    has_rates = any(point.lr for point in own)
    with png(path, (8, 7 if has_rates else 5), layout="constrained") as figure:
        panels = figure.subplots(
            2 if has_rates else 1, 1, sharex=True, squeeze=False,
            height_ratios=[3, 1] if has_rates else [1],
        )[:, 0]  # fmt: skip
        axes = panels[0]
        limits = limits_of(point.spread for point in points)
        batches = list(dict.fromkeys(point.batch for point in points))
        for batch, color in zip(batches, [BLUE, *RUN_COLORS[3:]] * len(batches), strict=False):
            chosen = [point for point in points if point.batch == batch and point.spread.values]
            if not chosen:
                continue
            x = [places[point.checkpoint.label] for point in chosen]
            name = r"$\lambda_c$" if batch == TRAIN else rf"$\lambda_c^{{1\to 2}}$, {batch}"
            draw_band(axes, x, [p.spread for p in chosen], limits, color=color, label=name)
        if has_rates:
            known = [point for point in own if point.own]
            x = [places[point.checkpoint.label] for point in known]
            first, lr, edge, preconditioned = (
                np.array([(point.own or {}).get(field) for point in known], dtype=float)
                for field in OWN.values()
            )
            edge_style: dict[str, Any] = {"color": VERMILION, "linewidth": 1.3, "marker": "."}
            for values, style in (
                (first, {"label": "as in the training", "color": BLUE, "linestyle": "",
                         "marker": "x", "markersize": 9}),
                (edge, {"label": r"$2/\eta-\gamma$", **edge_style}),
                (preconditioned, {"label": r"$\frac{1+\beta_1}{1-\beta_1}(2/\eta-\gamma)$",
                                  "linestyle": (0, (4, 2)), **edge_style}),
            ):  # fmt: skip
                if np.isfinite(values).any():
                    axes.plot(x, values, **style)
            panels[1].plot(x, lr, color=GREEN, marker="o")
            panels[1].set_title(r"learning rate $\eta$")
            panels[1].set_ylim(bottom=0)
        axes.set_yscale("log")
        axes.set_title("Critical sharpness at the checkpoints, and over 68 % of the batches")
        if axes.has_data():
            axes.legend(frameon=False)
        panels[-1].set_xlabel(label)


def _places(points: Sequence[Point]) -> tuple[str, dict[str, float]]:
    """What the axis is of, and the place of each checkpoint on it: tokens where all names tell
    them, else iterations, else their order."""
    checkpoints = {point.checkpoint.label: point.checkpoint for point in points}
    for name, values in (
        ("tokens", {label: c.tokens for label, c in checkpoints.items()}),
        ("iteration", {label: c.iteration for label, c in checkpoints.items()}),
    ):
        known = {label: float(value) for label, value in values.items() if value is not None}
        if len(set(known.values())) == len(checkpoints):
            return name, known
    return "checkpoint", {label: float(i) for i, label in enumerate(checkpoints)}
