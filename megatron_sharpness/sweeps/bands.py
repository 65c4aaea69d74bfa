"""λ_c over several batches, drawn as a line with a band around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sharpness.sweeps.spread import Spread


def limits_of(spreads: Iterable[Spread]) -> tuple[float, float]:
    """Where a band ends below and above, λ_c = 0 and ∞ among its values."""
    finite = [value for spread in spreads for value in spread.finite if value > 0]
    return min(finite, default=1.0) / 2, 2.0 * max(finite, default=1.0)


def draw_band(
    axes: Any,
    x: Sequence[float],
    spreads: Sequence[Spread],
    limits: tuple[float, float],
    *,
    color: str,
    label: str,
    between: NDArray[np.float64] | None = None,
) -> None:
    """Medians and the middle 68 %; a median of ∞ is a triangle at the upper end.

    The lines are straight, or have η_c = 2/λ linear at all places ``between`` those of ``x``, which
    ascend then.
    """
    band = [np.array([spread.quantile(part) for spread in spreads]) for part in (0.16, 0.5, 0.84)]
    capped = np.isinf(band[1])
    axes.plot(np.array(x)[capped], np.full(capped.sum(), limits[1]), "^", color=color, markersize=9)
    places: Any = x
    marked = None
    if between is not None:
        places, marked = between, np.searchsorted(between, x)
        with np.errstate(divide="ignore"):  # η_c = 0 is λ = ∞
            band = [2 / np.interp(between, x, 2 / np.maximum(line, limits[0])) for line in band]
    low, median, high = np.clip(band, *limits)
    axes.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(places, median, color=color, marker="o", markevery=marked, label=label)
