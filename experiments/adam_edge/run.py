"""Full-batch Adam at the edge of stability, with three values of β₁."""

from __future__ import annotations

import numpy as np
import torch

from experiments import digits, training

#: β₁ → a learning rate at which the edge is reached within :data:`STEPS`.
RATES = {0.0: 1e-3, 0.5: 1e-2, 0.9: 2e-2}
STEPS, EVERY, EXACT_EVERY = 600, 5, 20
#: The plateau is what comes after this step.
PLATEAU = 300


def run(beta1: float) -> list[training.Row]:
    """Training on 1000 digits, all of them at each step, with exact curvature beside λ_c."""
    batch = digits.images(1000, 1.0)
    model = digits.network(32, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATES[beta1], betas=(beta1, 0.999))
    return training.train(
        model, optimizer, digits.squared_error, lambda step: batch,
        steps=STEPS, every=EVERY, exact_every=EXACT_EVERY,
    )  # fmt: skip


def plateau(rows: list[training.Row]) -> dict[str, float]:
    """Curvatures over the plateau, each divided by its edge-of-stability line.

    λ_c and λ_dir are ratios with the slope ⟨g, Δθ⟩ below, so their mean is weighted with it. Where
    the loss has stopped to fall in the mean, that mean is 2/η: the first-order decreases η⟨g, Δθ⟩
    and the second-order increases ½η²ΔθᵀHΔθ cancel. Of λ_max^PH it is the median.
    """
    late = [row for row in rows if row["iteration"] > PLATEAU]
    slope = training.column(late, "slope")
    found = {}
    for field in ("critical_sharpness", "exact_directional_sharpness"):
        ratio = training.column(late, field) / training.column(late, "edge_of_stability")
        seen = np.isfinite(ratio)
        found[field] = float(np.average(ratio[seen], weights=slope[seen]))
    ratio = training.column(late, "preconditioned_sharpness") / training.column(
        late, "edge_of_stability_preconditioned"
    )
    return found | {"preconditioned_sharpness": float(np.nanmedian(ratio))}
