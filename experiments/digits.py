"""Images of handwritten digits, which scikit-learn ships, and networks that fit them."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@functools.cache
def images(number: int, scale: float) -> Batch:
    """The first ``number`` digits: pixels standardised and times ``scale``, one-hot labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.data[:number], dtype=torch.float32)
    pixels = (pixels - pixels.mean()) / pixels.std()
    return scale * pixels, F.one_hot(torch.tensor(data.target[:number]), 10).float()


def network(width: int, hidden_layers: int, seed: int = 0) -> nn.Sequential:
    """Fully connected, with GELU, from PyTorch's initialization."""
    torch.manual_seed(seed)
    sizes = [64, *[width] * hidden_layers]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Half the squared distance from the labels, mean over examples."""
    inputs, targets = batch
    return 0.5 * (model(inputs) - targets).square().sum(dim=1).mean()
