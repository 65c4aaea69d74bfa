"""The picture of a sweep over shares."""

from __future__ import annotations

import math

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")

# ruff: noqa: E402
from matplotlib.figure import Figure

from megatron_sharpness.sweeps.mix.figure import draw_sweep
from megatron_sharpness.sweeps.mix.recommendation import recommend


@pytest.mark.parametrize("last", [2000.0, math.inf])
def test_the_lines_cross_where_the_crossing_is_drawn(last: float) -> None:
    sweep = {
        0.0: {"prose": [900.0], "code": [30.0]},
        0.5: {"prose": [200.0], "code": [40.0]},
        1.0: {"prose": [100.0], "code": [last]},
    }
    advice = recommend(sweep)
    assert advice.crossing is not None
    axes = Figure().subplots()
    draw_sweep(axes, sweep, advice, "prose")
    lines = {line.get_label(): line for line in axes.get_lines()}
    prose, code = (
        float(np.interp(advice.crossing, *lines[task].get_data())) for task in ("prose", "code")
    )
    assert prose == pytest.approx(code, rel=0.02)
    # The medians themselves are marked, and lie on the lines.
    for task, values in (("prose", [900.0, 200.0, 100.0]), ("code", [30.0, 40.0])):
        x, y = lines[task].get_data()
        marked = lines[task].get_markevery()
        assert x[marked] == pytest.approx([0.0, 0.5, 1.0])
        assert y[marked][: len(values)] == pytest.approx(values)
