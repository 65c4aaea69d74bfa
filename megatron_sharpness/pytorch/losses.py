"""Losses as a loop gives them: a sum and a number of tokens of this rank, checked."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_sharpness.core.errors import ProbeError
from megatron_sharpness.core.replay import all_max, reduce_loss
from megatron_sharpness.pytorch.passes import collective_device

#: A sum of losses in nats and the number of tokens that it was summed over.
LossSum = tuple[Tensor | float, Tensor | float]

#: Gives them at the model's weights.
Evaluate = Callable[[], LossSum]


def explained(error: Exception) -> Exception:
    """What went wrong in an evaluation, and what to do where that is known."""
    if isinstance(error, RuntimeError) and "require grad" in str(error):
        return ProbeError(
            f"{error}. evaluate is called under no_grad: compute a loss that differentiates itself "
            "in `with torch.enable_grad():`, and return it detached"
        )
    return error


def whole(value: Tensor | float) -> Tensor | float:
    return value.full_tensor() if isinstance(value, DTensor) else value


def training_loss_of(loss: LossSum | None) -> float | None:
    """The mean of all ranks, or None where not every rank gives its part. Collective.

    Raises:
        ProbeError: a rank's part is none that can be compared.
    """
    given = torch.tensor([loss is None], dtype=torch.float64)
    if all_max(given, collective_device()).item():
        return None
    total: Tensor | float = 0.0
    tokens: Tensor | float = 0.0
    error: Exception | None = None
    try:
        total, tokens = sums_of(loss, "loss")
    except Exception as caught:
        error = caught
    return reduce_loss(total, tokens, error, collective_device())[0]


def sums_of(given: Any, name: str = "evaluate()") -> LossSum:
    """What ``evaluate`` returned, or the loop gave, checked."""
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(
            f"{name} is {type(given).__name__}; it is to be a tuple of this rank's sum of losses "
            "and number of tokens"
        )
    loss, tokens = given
    for value in given:
        if isinstance(value, bool) or not isinstance(value, (Tensor, Real)):
            raise TypeError(f"{name} holds {value!r}, which is no number")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise TypeError(
            f"{name} has a loss of shape {tuple(loss.shape)}; it is to be the sum of losses, one "
            "number: reduction='sum'"
        )
    if isinstance(loss, Tensor) and loss.is_floating_point() and loss.dtype.itemsize < 4:
        raise TypeError(
            f"{name} has a loss in {loss.dtype}, too coarse to compare; compute the loss in fp32, "
            "from logits.float()"
        )
    return whole(loss), whole(tokens)
