"""The UV model: a two-layer linear network on one example."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments import training

WIDTH = 16
#: Of each run: learning rate, target y, spread of the weights at the start, steps.
RUNS = {
    "sharpness-reduction": (0.48, 0.5, 1.2, 10),
    "progressive-sharpening": (0.05, 8.0, 0.5, 36),
    "edge-of-stability": (0.52, 8.0, 0.5, 40),
}


class UV(nn.Module):
    """f = uᵀv/√n with u, v ∈ Rⁿ: the network x ↦ uᵀ(vx)/√n at the one example x = 1."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        start = spread * torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)
        # The layers have a part in common, so that f > 0 at first.
        self.u, self.v = nn.Parameter(start[0]), nn.Parameter(start[0] + start[1])

    def forward(self) -> Tensor:
        return torch.dot(self.u, self.v) / WIDTH**0.5


def loss(model: nn.Module, target: float) -> Tensor:
    """½(f − y)²."""
    error: Tensor = model() - target
    return 0.5 * error**2


def run(name: str) -> list[training.Row]:
    """One of :data:`RUNS`, measured at every step, with a bracket of 0.1 %."""
    lr, target, spread, steps = RUNS[name]
    model = UV(spread)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return training.train(
        model, optimizer, loss, lambda step: target,
        steps=steps, every=1, exact_every=1, tolerance=1e-3,
    )  # fmt: skip


def orbits(
    rates: NDArray[np.float64], decay: float = 0.0, target: float = 8.0, kept: int = 64
) -> NDArray[np.float64]:
    """The last outputs f of 20,000 steps θ ← θ − η(g + γθ) at each of ``rates``; [rate, kept].

    ``decay`` is γ. NaN where the run has diverged. In numpy, all rates at once.
    """
    steps = 20_000
    model = UV(0.5)
    start = np.stack([p.detach().numpy() for p in model.parameters()])  # [2, n]
    weights = np.repeat(start[None], len(rates), axis=0)  # [rate, 2, n]
    outputs = np.empty((len(rates), kept))
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(steps):
            f = np.einsum("rn,rn->r", weights[:, 0], weights[:, 1]) / WIDTH**0.5
            if step >= steps - kept:
                outputs[:, step - steps] = f
            slope = (rates * (f - target) / WIDTH**0.5)[:, None, None]
            shrunk = weights * (1.0 - rates * decay)[:, None, None]
            weights = shrunk - slope * weights[:, ::-1]
    outputs[~np.isfinite(outputs).all(axis=1)] = np.nan
    return outputs


def period(orbit: NDArray[np.float64]) -> int | None:
    """The smallest power of two after which an orbit repeats to 1e-6; None: none up to 16."""
    for length in (1, 2, 4, 8, 16):
        if np.allclose(orbit[length:], orbit[:-length], rtol=0, atol=1e-6):
            return length
    return None
