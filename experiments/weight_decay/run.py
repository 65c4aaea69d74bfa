"""Where the edge of stability lies under weight decay, on the UV model (Result 3.1)."""

from __future__ import annotations

import numpy as np
import torch

from experiments import training
from experiments.uv.model import UV, loss, orbits

TARGET, SPREAD = 8.0, 0.5
DECAYS = (0.0, 0.1, 0.2, 0.4)
#: How far beyond the onset of oscillation the runs are.
BEYOND = 1.001
STEPS = 1500


def onset(decay: float) -> float:
    """The smallest learning rate at which gradient descent ends in an oscillation, to 0.01 %."""
    rates = np.linspace(0.45, 0.7, 26)
    for _ in range(3):
        last = orbits(rates, decay)
        oscillates = np.ptp(last, axis=1) > 1e-2
        first = int(np.argmax(oscillates))
        rates = np.linspace(rates[first - 1], rates[first], 26)
    return float(rates[-1])


def run(decay: float, lr: float) -> list[training.Row]:
    """Eight steps of the oscillation that gradient descent ends in."""
    model = UV(SPREAD)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, TARGET).backward()
        optimizer.step()
    return training.train(
        model, optimizer, loss, lambda step: TARGET,
        steps=8, every=1, exact_every=1, tolerance=1e-3,
    )  # fmt: skip


def edges(rows: list[training.Row]) -> dict[str, float]:
    """2/η, 2/η − γ, and over the oscillation the mean λ_max^H and ΣΔθᵀHΔθ/Σ⟨g, Δθ⟩."""
    slope = training.column(rows, "slope")
    directional = training.column(rows, "exact_directional_sharpness")
    return {
        "2/lr": 2 / rows[0]["lr"],
        "2/lr - decay": rows[0]["edge_of_stability"],
        "hessian_sharpness": float(training.column(rows, "hessian_sharpness").mean()),
        "directional_sharpness": float(np.average(directional, weights=slope)),
    }
