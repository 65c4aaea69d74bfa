"""Proof that a frozen run has left the model as it was."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_sharpness.core.memory import device_peak, host_peak
from megatron_sharpness.core.replay import of_all_ranks

_CHUNK = 1 << 24  # elements of a tensor that are copied to the host at a time


class FrozenRun:
    """A run that trains nothing: what its model is at the beginning, and that it is so at the end.

    Args:
        tensors: gives this rank's part of the model, parameters and buffers.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self._tensors = tensors
        self._before = fingerprint(tensors())
        self._began = time.perf_counter()

    def finish(self, say: Callable[[str], Any]) -> None:
        """Compare, and say so: a line that :mod:`megatron_sharpness.sweeps.runs` reads. Collective.

        Raises:
            RuntimeError: something has changed.
        """
        seconds = time.perf_counter() - self._began
        memory = max(of_all_ranks(device_peak() or host_peak()))
        after = fingerprint(self._tensors())
        if after != self._before:
            raise RuntimeError(
                "critical sharpness, frozen: parameters or buffers are not what they were: sha256 "
                f"{self._before} before, {after} after. The run's numbers are not to be used"
            )
        say(
            f" critical sharpness, frozen: parameters and buffers are what they were, sha256 "
            f"{after} | steps and measurements took {seconds:.3f} s | peak memory of a process: "
            f"{memory / 2**20:.1f} MiB |"
        )


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors of all ranks, in the order of the ranks. Collective.

    It is of every bit. 16 bits are widened, which loses none: Megatron's router widens its expert
    bias in its first forward pass.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        narrow = local.is_floating_point() and local.dtype.itemsize < 4
        dtype = torch.float32 if narrow else local.dtype
        digest.update(f"{dtype} {tuple(local.shape)}".encode())
        for part in torch.split(local.detach().reshape(-1), _CHUNK):
            digest.update(part.to("cpu", dtype).view(torch.uint8).numpy())
    if not dist.is_initialized():
        return digest.hexdigest()
    return hashlib.sha256(b"".join(of_all_ranks(digest.digest()))).hexdigest()
