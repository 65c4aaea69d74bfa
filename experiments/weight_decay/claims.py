"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

from experiments import training
from experiments.weight_decay import run as weight_decay


def claims(runs: training.Runs) -> training.Found:
    text = "weight decay moves the edge of λ_max to 2/η − γ (Result 3.1): λ_max / (2/η − γ)"
    for decay in weight_decay.DECAYS[1:]:
        found = weight_decay.edges(runs[f"decay-{decay:g}"])
        ratio = found["hessian_sharpness"] / found["2/lr - decay"]
        yield text, f"γ = {decay:g}", ratio, 0.99, 1.01
