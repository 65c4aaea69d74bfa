"""What it takes to evaluate a training step's loss once more, in any framework."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sharpness.core.errors import ProbeError, reason_of


class RandomStates:
    """The random states of Python, NumPy and PyTorch, those of the current device included."""

    def __init__(self) -> None:
        accelerated = torch.accelerator.is_available()
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._device = _device_module().get_rng_state() if accelerated else None

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._device is not None:
            _device_module().set_rng_state(self._device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RandomStates) and self.values() == other.values()

    __hash__ = None  # type: ignore[assignment]

    def values(self) -> dict[str, Any]:
        """The states as they can be compared, by name."""
        kind, keys, *rest = self._numpy
        tensors = {"torch": self._cpu, "device": self._device}
        return {
            "python": self._python,
            "numpy": (kind, np.asarray(keys).tobytes(), *rest),
            **{name: t.numpy().tobytes() for name, t in tensors.items() if t is not None},
        }


def _device_module() -> Any:
    return torch.get_device_module(torch.accelerator.current_accelerator())


def reduce_loss(
    loss: Tensor | float,
    weight: Tensor | float,
    error: Exception | None,
    device: torch.device,
    *,
    tokens: Tensor | float | None = None,
) -> tuple[float, int]:
    """Mean loss over all ranks, and the number of tokens. Collective.

    The sums of the ranks are added in fp64, never the means. An error on any rank travels in the
    same reduction, so that all ranks give up together.

    Args:
        loss: this rank's sum of losses, in nats. A tensor on ``device`` is not waited for.
        weight: what it is divided by, summed over the ranks: as a rule the tokens that it was
            summed over.
        tokens: of the batch, where they are not the weight.
        error: why this rank has no loss, if so.
        device: where the process group reduces.

    Returns:
        The same numbers on every rank: rank 0's.

    Raises:
        ProbeError: ``error`` was given on some rank.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    if error is None:
        sums[0], sums[1], sums[2] = loss, weight, weight if tokens is None else tokens
    else:
        sums[3] = 1.0
    total, weights, count, failures = all_sum(sums, device).tolist()
    if failures:
        raise ProbeError(first_error(error))
    return (total / weights if weights else float("nan")), int(count)


def all_sum(values: Tensor, device: torch.device) -> Tensor:
    """The sum of ``values`` over all ranks, the same bits on each. Collective."""
    values = values.to(device)
    if dist.is_initialized():
        dist.all_reduce(values)
        dist.broadcast(values, src=0)  # an all-reduce may round differently on each rank
    return values


def all_max(values: Tensor, device: torch.device) -> Tensor:
    """The largest of each of ``values`` over all ranks. Collective."""
    values = values.to(device)
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def of_all_ranks(value: Any) -> list[Any]:
    """The objects that the ranks give, in their order. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_error(error: Exception | None) -> str:
    """The error of the lowest rank that has one, and which rank that is. Collective."""
    text = None if error is None else reason_of(error)
    if not dist.is_initialized():
        return text or ""
    errors = enumerate(of_all_ranks(text))
    rank, text = next((rank, text) for rank, text in errors if text is not None)
    return f"rank {rank}: {text}"
