"""Whether λ_c follows λ_max of the pre-conditioned Hessian along a run of Adam."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import spearmanr

from experiments import digits, training

EXAMPLES = 1000
WARMUP, DECAY_FROM, STEPS, EVERY = 50, 250, 1000, 20
#: Of its peak, at the end of the decay.
LAST_RATE = 0.1
#: Run → batch size and peak learning rate.
RUNS = {
    "batch-250-0.01": (250, 1e-2),
    "batch-250-0.003": (250, 3e-3),
    "full-batch-0.01": (EXAMPLES, 1e-2),
    "full-batch-0.003": (EXAMPLES, 3e-3),
}


def run(size: int, peak: float) -> list[training.Row]:
    """Warm-up, constant rate and linear decay on 1000 digits; the curvature of the step's batch."""
    inputs, targets = digits.images(EXAMPLES, 1.0)
    model = digits.network(32, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=peak)
    order = np.random.default_rng(0)

    def batch_at(step: int) -> digits.Batch:
        chosen = order.choice(EXAMPLES, size, replace=False)
        return inputs[chosen], targets[chosen]

    def lr_at(step: int) -> float:
        done = max(0.0, (step - DECAY_FROM) / (STEPS - DECAY_FROM))
        return peak * min(1.0, step / WARMUP) * (1.0 - done * (1.0 - LAST_RATE))

    return training.train(
        model, optimizer, digits.squared_error, batch_at, steps=STEPS, every=EVERY,
        exact_every=EVERY, lr_at=lr_at, hessian=False,
    )  # fmt: skip


def correlation(rows: list[training.Row]) -> float:
    """Spearman's rank correlation of λ_c with λ_max^PH along a run."""
    found = [row for row in rows if row["critical_sharpness"] is not None]
    return float(
        spearmanr(
            training.column(found, "critical_sharpness"),
            training.column(found, "preconditioned_sharpness"),
        ).statistic
    )
