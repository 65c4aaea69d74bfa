"""λ_c^{1→2} of every task against the share of the data that varies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sharpness.report.figure import INK, MUTED, RUN_COLORS, png
from megatron_sharpness.sweeps.bands import draw_band, limits_of
from megatron_sharpness.sweeps.mix.recommendation import Recommendation
from megatron_sharpness.sweeps.spread import Spread


def draw(
    values: Mapping[float, Mapping[str, Sequence[float]]],
    advice: Recommendation,
    path: Path,
    name: str,
) -> None:
    """:func:`draw_sweep` as a PNG.

    Raises:
        InputError: it cannot be written, or matplotlib is missing.
    """
    with png(path, (8, 5.5), layout="constrained") as figure:
        draw_sweep(figure.subplots(), values, advice, name)


def draw_sweep(
    axes: Any,
    values: Mapping[float, Mapping[str, Sequence[float]]],
    advice: Recommendation,
    name: str,
) -> None:
    """Medians, the middle 68 % shaded, the crossing and the recommended share.

    Between the shares η_c = 2/λ is linear, as the crossing has it, so that the lines cross there.
    A value of ∞, of a loss that rises at once, is drawn at the upper end, as a triangle.

    Args:
        axes: matplotlib's.
        values: λ_c^{1→2} by share and task, a number for each batch.
        advice: what follows from them.
        name: of the data whose share varies.
    """
    shares = list(values)
    spreads = {
        task: [Spread(tuple(numbers[task])) for numbers in values.values()]
        for task in values[shares[0]]
    }
    limits = limits_of(spread for found in spreads.values() for spread in found)
    between = np.union1d(shares, np.linspace(shares[0], shares[-1], 500))
    for (task, found), color in zip(spreads.items(), RUN_COLORS * len(spreads), strict=False):
        draw_band(axes, shares, found, limits, color=color, label=task, between=between)
    if advice.crossing is not None:
        axes.axvline(advice.crossing, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
        side = 1 if advice.crossing < (shares[0] + shares[-1]) / 2 else -1
        axes.annotate(
            f"cross at {advice.crossing:.2f}", (advice.crossing, 0.02), color=MUTED,
            xycoords=("data", "axes fraction"), xytext=(4 * side, 0), textcoords="offset points",
            horizontalalignment="left" if side > 0 else "right",
        )  # fmt: skip
    if 0 < advice.critical_sharpness < math.inf:
        axes.plot(
            advice.share, advice.critical_sharpness, "*", color=INK, markersize=14, zorder=5,
            label=f"recommended: r = {advice.share:g}",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel(f"share of {name}, r")
    axes.set_title(r"$\lambda_c^{1\to 2}$ of each task: the higher, the sooner it rises")
    axes.legend(frameon=False)
