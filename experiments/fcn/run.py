"""A fully connected network under SGD, with the full batch and two mini-batch sizes (Fig. 3)."""

from __future__ import annotations

import numpy as np
import torch

from experiments import digits, training

EXAMPLES, SCALE, WIDTH, HIDDEN_LAYERS = 400, 6.0, 512, 3
LR, STEPS, EVERY, EXACT_EVERY = 3e-2, 1600, 10, 80
#: Run → batch size.
RUNS = {"full-batch": EXAMPLES, "batch-100": 100, "batch-25": 25}
#: The plateau is what comes after this step.
PLATEAU = 800


def run(name: str, exact_every: int = EXACT_EVERY) -> list[training.Row]:
    """One of :data:`RUNS`; the exact curvature is that of the step's own batch."""
    size = RUNS[name]
    inputs, targets = digits.images(EXAMPLES, SCALE)
    model = digits.network(WIDTH, HIDDEN_LAYERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    order = np.random.default_rng(0)

    def batch_at(step: int) -> digits.Batch:
        if size == EXAMPLES:
            return inputs, targets
        chosen = order.choice(EXAMPLES, size, replace=False)
        return inputs[chosen], targets[chosen]

    return training.train(
        model, optimizer, digits.squared_error, batch_at,
        steps=STEPS, every=EVERY, exact_every=exact_every,
    )  # fmt: skip


def plateau(rows: list[training.Row], field: str) -> float:
    """The median over the plateau of a curvature divided by 2/η."""
    late = [row for row in rows if row["iteration"] > PLATEAU]
    return float(
        np.nanmedian(training.column(late, field) / training.column(late, "edge_of_stability"))
    )
