"""The most memory that a piece of a program takes beyond what it began with."""

from __future__ import annotations

from pathlib import Path

import torch

#: Has glibc give freed blocks of 64 KiB and more back at once, so that what is resident is in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Peak:
    """Bytes of the allocator on a GPU, resident ones of the process elsewhere (Linux).

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._start = _resident("VmRSS")

    def bytes(self) -> int:
        """The peak since the beginning, above the beginning."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self._start
        return _resident("VmHWM") - self._start


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
