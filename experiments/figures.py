"""What the experiments' figures have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.training import Row, column
from megatron_sharpness.report.figure import BLUE, FONT_SIZE, GREEN, MUTED, STYLE, VERMILION

__all__ = ["BLUE", "GREEN", "MUTED", "ORANGE", "PURPLE", "VERMILION", "curves", "figure"]

# Okabe and Ito's, told apart by colour-blind readers too
ORANGE, PURPLE = "#B87800", "#A3568A"

#: Field of a record → label, colour and line of its curve.
CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "critical_sharpness": (r"$\lambda_c$", {"color": BLUE}),
    "exact_directional_sharpness": (
        r"$\lambda_{dir}$, exact", {"color": ORANGE, "linestyle": (0, (4, 1.5))},
    ),
    "hessian_sharpness": (r"$\lambda_{max}^H$", {"color": GREEN}),
    "preconditioned_sharpness": (r"$\lambda_{max}^{PH}$", {"color": PURPLE}),
    "lr_over_critical": (r"$\eta/\eta_c$", {"color": BLUE}),
    "loss": (r"$L$", {"color": GREEN}),
    "edge_of_stability": (r"$2/\eta-\gamma$", {"color": VERMILION, "linewidth": 1.3}),
    "edge_of_stability_preconditioned": (
        r"$\frac{1+\beta_1}{1-\beta_1}(2/\eta-\gamma)$",
        {"color": VERMILION, "linewidth": 1.3, "linestyle": (0, (4, 2))},
    ),
}  # fmt: skip


@contextlib.contextmanager
def figure(
    path: Path, rows: int, columns: int, *, height: float = 3.6, **options: Any
) -> Iterator[Any]:
    """Axes of a grid, [row][column], saved into ``path`` in the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"font.size": FONT_SIZE - 1}):
        drawn = Figure(figsize=(4.4 * columns, height * rows), dpi=140, layout="constrained")
        yield drawn.subplots(rows, columns, squeeze=False, **options)
        drawn.savefig(path)


def curves(axes: Any, rows: Sequence[Row], fields: Sequence[str], **style: Any) -> None:
    """The curves of these fields over the steps, with what :data:`CURVES` says of them."""
    steps = column(rows, "iteration")
    for field in fields:
        label, own = CURVES[field]
        values = column(rows, field)
        seen = np.isfinite(values)
        axes.plot(steps[seen], values[seen], **{"label": label, **own, **style})
