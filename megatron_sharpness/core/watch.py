"""Whether training is untouched: everything that it reads later, fingerprinted and compared.

Between a step and the next one nothing is to change but what is put back. What is known to change
is put back by those who know it; the watch sees the rest by itself, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sharpness.core.replay import all_max, of_all_ranks
from megatron_sharpness.core.state import State

#: Elements of a tensor that are summed at a time.
CHUNK = 2**20

#: Tensors of so many elements are kept beside their checksum, and can be put back: logs, counters.
SMALL = 2**12


class Watch:
    """Fingerprints of objects before a measurement, to compare with them after it.

    Args:
        roots: gives the objects by name, the same before and after.
        options: of :class:`~megatron_sharpness.core.state.State`.
    """

    def __init__(self, roots: Callable[[], Mapping[str, object]], **options: Any) -> None:
        self._roots = roots
        self._options = {"parameters": True, "copied": _is_small, **options}
        self._state, self._prints = State({}), dict[str, Any]()
        self._error: Exception | None = None
        try:
            self._state, self._prints = self._look()
        except Exception as caught:  # out of memory, say; :meth:`changes` says so on all ranks
            self._error = caught

    def changes(self, device: torch.device) -> list[str]:
        """What is not as it was, on any rank; it is put back where that can be done. Collective.

        Args:
            device: where the process group reduces.
        """
        changed = self._compare()
        if changed:
            self._state.restore()
        if not all_max(torch.tensor([float(len(changed))]).double(), device).item():
            return []
        return _of_all_ranks(changed)

    def _compare(self) -> list[str]:
        try:
            _, prints = self._look()
        except Exception as caught:
            self._error = caught
        if self._error is not None:
            return [f"what could not be read ({type(self._error).__name__}: {self._error})"]
        names = {**self._prints, **prints}
        absent = object()
        return [
            name
            for name in names
            if not _equal(self._prints.get(name, absent), prints.get(name, absent))
        ]

    @property
    def size(self) -> tuple[int, int]:
        """How many values a look compares, and how many bytes of tensors it reads."""
        return len(self._prints), sum(t.nbytes for t in self._state.tensors.values())

    def _look(self) -> tuple[State, dict[str, Any]]:
        state = State(self._roots(), **self._options)
        sums = dict(zip(state.tensors, Checksums(state.tensors.values()).values(), strict=True))
        kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in state.tensors.items()}
        return state, {**state.plain, **{name: (sums[name], kinds[name]) for name in sums}}


class Checksums:
    """Checksums of tensors; they are waited for when they are compared, all at once."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._sums = [checksum(tensor) for tensor in tensors]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checksums) and self.values() == other.values()

    __hash__ = None  # type: ignore[assignment]

    def values(self) -> list[int]:
        return fetched(self._sums)


def fetched(values: Sequence[Tensor]) -> list[Any]:
    """Tensors of one shape and type as numbers; those of a device are waited for together."""
    devices = {value.device for value in values}
    found = {
        device: iter(torch.stack([v for v in values if v.device == device]).tolist())
        for device in devices
    }
    return [next(found[value.device]) for value in values]


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Σ (2i + 1)·w_i over the 32-bit words of the tensor, chunk by chunk; on its device, not waited
    for."""
    tensor = tensor.detach()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if not tensor.numel():
        return total
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    rows = max(1, CHUNK * len(tensor) // tensor.numel())
    odd = torch.arange(1, 2, 2, dtype=torch.int32, device=tensor.device)
    for part in torch.split(tensor, rows):
        for words in filter(len, _words(part)):
            if len(words) > len(odd):
                odd = torch.arange(1, 2 * len(words), 2, dtype=torch.int32, device=tensor.device)
            total = 31 * total + (words * odd[: len(words)]).sum(dtype=torch.int64)
    return total


def _words(part: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor as 32-bit integers, and the bytes that are left."""
    data = part.contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 4:
        data = data.clone()
    whole = len(data) // 4 * 4
    return data[:whole].view(torch.int32), data[whole:].to(torch.int32)


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= SMALL


def _equal(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if isinstance(before, np.ndarray):
        return isinstance(after, np.ndarray) and before.tobytes() == after.tobytes()
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and torch.equal(before, after)
    if isinstance(before, dict):
        return isinstance(after, dict) and list(before) == list(after) and all(
            _equal(value, after[key]) for key, value in before.items()
        )
    if isinstance(before, (tuple, list)):
        return isinstance(after, (tuple, list)) and len(before) == len(after) and all(
            map(_equal, before, after)
        )
    both_nan = before != before and after != after
    return type(before) is type(after) and (bool(before == after) or both_nan)


def _of_all_ranks(changed: list[str]) -> list[str]:
    """The names of all ranks, in the order of the first that has them. Collective."""
    return list(dict.fromkeys(name for names in of_all_ranks(changed) for name in names))
