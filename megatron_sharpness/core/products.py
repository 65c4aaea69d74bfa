"""What the gradient says of an update, and how far rounded weights follow it.

The forward pass reads each weight θ_i rounded to its own precision, where the numbers around it lie
u_i apart. Weights that training has moved lie anywhere between them, and their errors are as good
as independent: they shift the loss by σ = √(Σ g_i²u_i²/12). Weights that lie on those numbers, as
they do when a model has just been made in 16 bits or is trained in them, have errors in common:
such a weight stays where it is until it is moved by u_i/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Weights are taken to lie anywhere if their distances to what the forward pass reads, Σ g²ρ², are
#: more than this part of what they are then, Σ g²u²/12.
DITHERED = 0.5

#: Else they follow the line once they are moved by so many times u/2, to within a quarter.
FOLLOWED = 4.0


@dataclass(frozen=True)
class StepProducts:
    """Sums over all weights, of a step from θ_t to θ_{t+1} that was made with the gradient g.

    Attributes:
        decrease: ⟨g, θ_t − θ_{t+1}⟩.
        squared_update: ‖θ_t − θ_{t+1}‖².
        squared_gradient: ‖g‖².
        rounding: Σ g²u²/12, with the :func:`spacing` u of what the forward pass reads.
        distance: Σ g²ρ², with the distance ρ of θ_t to what the forward pass reads.
        halfway: Σ |g|u/2 over the weights that the step has moved.
    """

    decrease: float
    squared_update: float
    squared_gradient: float
    rounding: float
    distance: float
    halfway: float

    COUNT = 6

    def noise(self, clip: float) -> float:
        """σ, in nats, where g was multiplied by ``clip``."""
        return math.sqrt(self.rounding) / clip

    def resolution(self, lr: float) -> float:
        """η below which the weights that the forward pass reads do not follow the line; 0 if none.

        A weight that lies on what the forward pass reads is moved by η|Δθ_i|, and read anew from
        u_i/2 on: in the mean, weighted with the gradient, at Σ |g|u/2 ÷ ⟨g, Δθ⟩.
        """
        if self.distance > DITHERED * self.rounding or self.decrease <= 0.0:
            return 0.0
        return FOLLOWED * self.halfway * lr / self.decrease


def product_sums(
    weights: Tensor, update: Tensor, grad: Tensor | None, read_in: torch.dtype
) -> Tensor:
    """The fields of :class:`StepProducts` for some weights; fp64, shape [6].

    Each is summed in the precision of the weights, pair by pair as PyTorch does: an error of 1e-7
    for a million of them.

    Args:
        weights: θ_t, in fp32 or fp64.
        update: θ_t − θ_{t+1}.
        grad: g, or None where it is 0.
        read_in: the type in which the forward pass reads them; one of 8 bits after a scaling.
    """
    squared_update = (update * update).sum()
    if grad is None:
        sums = torch.zeros(StepProducts.COUNT, dtype=torch.float64, device=weights.device)
        sums[1] = squared_update
        return sums
    read, slopes = weights, grad
    if read_in.itemsize == 1:
        scale = _scale(weights, read_in)
        read, slopes = weights * scale, grad / scale
    apart = spacing(read, read_in).mul_(slopes).abs_()
    away = (read - read.to(read_in).to(read.dtype)).mul_(slopes)
    moved = update.sign().abs_()  # a tenth of the time of a comparison on a CPU
    return torch.stack(
        (
            (grad * update).sum(),
            squared_update,
            (grad * grad).sum(),
            (apart * apart).sum() / 12,
            away.square_().sum(),
            apart.mul_(moved).sum() / 2,
        )
    ).double()


def _scale(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """What weights are multiplied with before they are read in 8 bits: the largest power of two
    with which the largest of them is still a number of that type."""
    largest = weights.abs().max().clamp(min=2.0**-100)  # biases that are still zero
    return (torch.finfo(dtype).max / largest).log2().floor().exp2()


def spacing(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between the numbers of a floating-point type around each weight.

    Args:
        weights: fp32 or fp64.
        dtype: the type, such as ``torch.bfloat16``.
    """
    bits, exponent = _EXPONENTS[weights.dtype]
    power = (weights.view(bits) & exponent).view(weights.dtype)  # of two, at most |weight|
    return power.clamp_(min=torch.finfo(dtype).tiny).mul_(torch.finfo(dtype).eps)


#: Integer of the same size, and the bits of the exponent in it.
_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}

