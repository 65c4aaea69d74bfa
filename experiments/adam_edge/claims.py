"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

from experiments import training
from experiments.adam_edge import run as adam_edge


def claims(runs: training.Runs) -> training.Found:
    found = {b: adam_edge.plateau(runs[f"beta1-{b:g}"]) for b in adam_edge.RATES}
    text = "under Adam λ_c settles at 2/η whatever β₁ is: λ_c · η/2"
    for beta1, values in found.items():
        yield text, f"β₁ = {beta1:g}", values["critical_sharpness"], 0.95, 1.05
    text = "and λ_max^PH at (2/η)(1 + β₁)/(1 − β₁) (Result 3.1): the ratio of the two"
    for beta1, values in found.items():
        # The oscillation raises the curvature that it is seen at: 10 %.
        yield text, f"β₁ = {beta1:g}", values["preconditioned_sharpness"], 0.9, 1.1
