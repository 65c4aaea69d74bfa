"""A module with buffers that forward passes read and change."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningNorm(nn.Module):
    """Normalizes by running statistics, which a pass in training mode reads and moves on, as
    codebooks and expert biases are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                flat = x.flatten(0, -2)
                self.mean.lerp_(flat.mean(0), 0.1)
                self.variance.lerp_(flat.var(0), 0.1)
        return (x - self.mean) * (self.variance + 1e-5).rsqrt()
