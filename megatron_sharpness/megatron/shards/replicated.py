"""Optimizers that step whole parameters: the model's own in fp32, or fp32 main copies of those in
16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def pairs(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Main parameters of a ``FP32Optimizer`` or a ``Float16OptimizerWithFloat16Params``, and where
    the forward pass reads them."""
    if not hasattr(optimizer, "float16_groups"):
        yield from ((parameter, parameter) for parameter in optimizer.get_parameters())
        return
    halves = zip(optimizer.fp32_from_float16_groups, optimizer.float16_groups, strict=True)
    for mains, models in halves:
        yield from zip(mains, models, strict=True)
    for mains in optimizer.fp32_from_fp32_groups:
        yield from zip(mains, mains, strict=True)
