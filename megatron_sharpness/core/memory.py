"""The most memory that this process has taken so far."""

from __future__ import annotations

import resource
import sys

import torch


def device_peak() -> int | None:
    """Bytes that PyTorch has allocated on the device at most; None where there is no device."""
    if not torch.accelerator.is_available():  # not torch.cuda, which Megatron on a CPU has mapped
        return None
    return int(torch.cuda.max_memory_allocated())


def host_peak() -> int:
    """Bytes of the largest resident set."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
