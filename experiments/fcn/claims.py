"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

from experiments import training
from experiments.fcn import run as fcn

STAY_BELOW = "mini-batch training stays below 2/η: λ_c · η/2"


def claims(runs: training.Runs) -> training.Found:
    full = runs["full-batch"]
    text = "full-batch descent settles at the edge of stability (Fig. 3): curvature · η/2"
    for label, field in (
        ("λ_c", "critical_sharpness"), ("λ_dir", "exact_directional_sharpness"),
        ("λ_max", "hessian_sharpness"),
    ):  # fmt: skip
        yield text, label, fcn.plateau(full, field), 0.95, 1.05
    for name in ("batch-100", "batch-25"):
        value = fcn.plateau(runs[name], "critical_sharpness")
        yield STAY_BELOW, name.replace("-", " of "), value, 0.1, 0.95
    everything = [row for rows in runs.values() for row in rows if "hessian_sharpness" in row]
    ratio = training.column(everything, "exact_directional_sharpness") / training.column(
        everything, "hessian_sharpness"
    )
    text = "λ_dir ≤ λ_max along the gradient (Result 2.1): λ_dir / λ_max"
    yield text, f"largest of {len(everything)} records", ratio.max(), 0.0, 1.0 + 1e-3
