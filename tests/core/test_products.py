"""What rounding weights does to the loss: predicted from one pass over them, and seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_sharpness.core.products import StepProducts, product_sums, spacing

TYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_spacing_is_that_of_the_next_number(dtype: torch.dtype, precision: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2000, generator=generator) * 10.0 ** torch.randint(-3, 3, (2000,))
    weights = weights.to(dtype)
    above = torch.nextafter(weights.abs().float(), torch.tensor(torch.inf))
    if dtype != torch.float32:
        bits = weights.abs().view(torch.int16) + 1
        above = bits.view(dtype).float()
    step = above.double() - weights.abs().double()
    found = spacing(weights.to(precision), dtype)
    assert found.dtype == precision
    assert torch.equal(found.double(), step)


def test_spacing_at_zero_and_among_subnormals_is_the_smallest() -> None:
    weights = torch.tensor([0.0, 1e-7, -3e-6])
    assert spacing(weights, torch.float16).tolist() == [2.0**-24] * 3


def sums(weights: Tensor, update: Tensor, grad: Tensor, dtype: torch.dtype) -> StepProducts:
    return StepProducts(*product_sums(weights, update, grad, dtype).tolist())


def test_the_noise_of_weights_in_8_bits_is_that_after_their_scaling() -> None:
    """Small weights fill the range of the type, as the power of two that they share does not."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(4000, generator=generator, dtype=torch.float64) * 1e-3
    errors, noises = [], []
    for _ in range(300):
        weights = 1e-4 * torch.randn(4000, generator=generator, dtype=torch.float64)
        scale = 448 / weights.abs().max()
        rounded = (weights * scale).to(torch.float8_e4m3fn).double() / scale
        errors.append(torch.dot(grad, rounded - weights).item())
        noises.append(sums(weights, weights, grad, torch.float8_e4m3fn).noise(1.0))
    seen = math.sqrt(sum(error**2 for error in errors) / len(errors))
    assert seen == pytest.approx(sum(noises) / len(noises), rel=0.2)
    still = torch.zeros(5)  # biases of a model that was just made
    assert sums(still, still, torch.ones(5), torch.float8_e4m3fn).noise(1.0) < 1e-30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_noise_is_what_rounding_trained_weights_does(dtype: torch.dtype) -> None:
    """⟨g, round(θ) − θ⟩ over draws of weights that lie anywhere between two numbers."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(4000, generator=generator, dtype=torch.float64) * 1e-3
    errors, noises = [], []
    for _ in range(300):
        weights = 0.02 * torch.randn(4000, generator=generator, dtype=torch.float64)
        rounded = weights.to(dtype).double()
        errors.append(torch.dot(grad, rounded - weights).item())
        products = sums(weights, torch.full_like(weights, 1e-3), grad, dtype)
        noises.append(products.noise(1.0))
        assert products.resolution(1e-3) == 0.0
    seen = math.sqrt(sum(error**2 for error in errors) / len(errors))
    assert seen == pytest.approx(sum(noises) / len(noises), rel=0.1)
    assert sums(weights, weights, grad / 4, dtype).noise(0.25) == pytest.approx(noises[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_on_the_grid_stay_there_up_to_the_resolution(dtype: torch.dtype) -> None:
    """A model that was made in 16 bits: the fall along −Δθ is seen from there on, to a quarter."""
    generator = torch.Generator().manual_seed(1)
    weights = (0.02 * torch.randn(20000, generator=generator)).to(dtype).float()
    grad = torch.randn(20000, generator=generator)
    direction = grad.sign() * (0.5 + torch.rand(20000, generator=generator))  # as of Adam
    lr = 1e-7
    products = sums(weights.double(), lr * direction.double(), grad.double(), dtype)
    assert products.distance == 0.0 and (resolution := products.resolution(lr)) > 0

    def followed(eta: float) -> float:
        moved = (weights - eta * direction).to(dtype).float()
        return (torch.dot(grad, weights - moved) / torch.dot(grad, eta * direction)).item()

    assert followed(resolution / 40) < 0.1
    for times in (1.0, 1.5, 2.0, 4.0, 10.0):
        assert followed(times * resolution) == pytest.approx(1.0, abs=0.25)


def test_without_a_gradient_the_update_counts_alone() -> None:
    update = torch.full((5,), 2.0)
    assert product_sums(torch.ones(5), update, None, torch.bfloat16).tolist() == [0, 20, 0, 0, 0, 0]
