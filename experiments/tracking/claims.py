"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

from experiments import training
from experiments.tracking import run as tracking


def claims(runs: training.Runs) -> training.Found:
    text = "λ_c follows λ_max^PH along a mini-batch run: rank correlation"
    yield text, "batch of 250, η = 0.01", tracking.correlation(runs["batch-250-0.01"]), 0.4, 1.0
    text = "and does not with the full batch below the edge (ours)"
    for peak in ("0.01", "0.003"):
        yield text, f"η = {peak}", tracking.correlation(runs[f"full-batch-{peak}"]), -1.0, 0.0
