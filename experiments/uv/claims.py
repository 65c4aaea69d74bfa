"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

import numpy as np

from experiments import training


def claims(runs: training.Runs) -> training.Found:
    text = "early sharpness reduction where training starts above the edge: λ_c · η/2"
    reduced = training.column(runs["sharpness-reduction"], "critical_sharpness")
    line = runs["sharpness-reduction"][0]["edge_of_stability"]
    yield text, "at the start", reduced[0] / line, 1.0, 2.0
    yield text, "at the end", reduced[-1] / line, 0.0, 0.9
    sharpened = training.column(runs["progressive-sharpening"], "critical_sharpness")
    last = runs["progressive-sharpening"][-1]
    text = "λ_c sharpens progressively, to the λ_max of the minimum"
    yield text, "λ_c at the end / at the start", sharpened[-1] / sharpened[0], 2.0, np.inf
    ratio = last["critical_sharpness"] / last["hessian_sharpness"]
    yield text, "λ_c / λ_max at the end", ratio, 0.98, 1.02
    orbit = runs["edge-of-stability"][-16:]
    mean = np.average(
        training.column(orbit, "critical_sharpness"), weights=training.column(orbit, "slope")
    )
    text = "beyond the edge training oscillates about it: mean λ_c · η/2"
    yield text, "period two", mean * orbit[0]["lr"] / 2, 0.95, 1.05
