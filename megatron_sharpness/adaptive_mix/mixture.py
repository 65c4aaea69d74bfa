"""Which component of a data mix each sample of a run is of."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 16  # samples that are drawn together


def weights_at(share: float, fixed: Sequence[float]) -> list[float]:
    """Weights of a component of this share and of the rest, whose proportions stay."""
    return [share, *((1.0 - share) * weight / sum(fixed) for weight in fixed)]


class Mixture:
    """Sample n of a run is of component i with probability wᵢ, and the weights may change underway.

    What a sample is depends on the seed, on n and on the weights at n alone, so that a resumed run
    goes on where it stopped, on any number of processes.

    Args:
        weights: of the components, not negative.
        seed: of what is drawn.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        #: The first sample with these weights, and the weights.
        self.changes: list[tuple[int, list[float]]] = [(0, list(weights))]
        self._counts = [np.zeros(len(weights), dtype=np.int64)]  # before each block
        self._block = functools.lru_cache(maxsize=2)(self._drawn)

    @property
    def weights(self) -> list[float]:
        """As they are from the last change on."""
        return self.changes[-1][1]

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Component of sample ``number``, and its own number among the samples of this component;
        all are counted from 0."""
        block, offset = divmod(number, _BLOCK)
        while len(self._counts) <= block:
            kinds, _ = self._block(len(self._counts) - 1)
            more = np.bincount(kinds, minlength=len(self.weights))
            self._counts.append(self._counts[-1] + more)
        kinds, numbers = self._block(block)
        return int(kinds[offset]), int(numbers[offset])

    def change(self, number: int, weights: Sequence[float]) -> None:
        """From sample ``number`` on it is these weights."""
        self.changes = [change for change in self.changes if change[0] < number]
        self.changes.append((number, list(weights)))
        del self._counts[number // _BLOCK + 1 :]
        self._block.cache_clear()

    def state_dict(self) -> dict[str, Any]:
        """The weights so far, for a checkpoint."""
        return {"changes": [[number, list(weights)] for number, weights in self.changes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for number, weights in state["changes"]:
            self.change(int(number), weights)

    def _drawn(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Components of a block's samples, and their numbers."""
        first = block * _BLOCK
        values = np.random.default_rng((self.seed, block)).random(_BLOCK)
        kinds = np.empty(_BLOCK, dtype=np.int64)
        for number, weights in self.changes:
            part = slice(max(number - first, 0), None)
            limits = np.cumsum(weights) / sum(weights)
            kinds[part] = np.searchsorted(limits[:-1], values[part], side="right")
        numbers = np.empty_like(kinds)
        for kind, before in enumerate(self._counts[block]):
            drawn = kinds == kind
            numbers[drawn] = before + np.arange(np.count_nonzero(drawn))
        return kinds, numbers
