"""Optimizers that step whole parameters: the model's own in fp32, or fp32 main copies of those in
16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_sharpness.megatron.shards.gathers import Stepped


def owns(optimizer: Any) -> bool:
    """All that no other way owns: a ``FP32Optimizer``, a ``Float16OptimizerWithFloat16Params``."""
    return True


def stepped(optimizer: Any) -> Iterator[Stepped]:
    """Main parameters, and where the forward pass reads them."""
    if not hasattr(optimizer, "float16_groups"):
        for parameter in optimizer.get_parameters():
            buffered = getattr(parameter, "main_grad", None)
            yield Stepped.of(parameter, parameter, buffered, parameter)
        return
    halves = zip(optimizer.fp32_from_float16_groups, optimizer.float16_groups, strict=True)
    for mains, models in halves:
        for main, model in zip(mains, models, strict=True):
            yield Stepped.of(main, model, getattr(model, "main_grad", None), model)
    for mains in optimizer.fp32_from_fp32_groups:
        for main in mains:
            yield Stepped.of(main, main, getattr(main, "main_grad", None), main)
