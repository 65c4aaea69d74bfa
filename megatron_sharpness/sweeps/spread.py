"""λ_c over several batches, and how measurements ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """λ_c of several batches.

    Attributes:
        values: each in [0, ∞].
    """

    values: tuple[float, ...]

    @property
    def finite(self) -> tuple[float, ...]:
        return tuple(value for value in self.values if value < math.inf)

    @property
    def rises_at_once(self) -> int:
        """Batches with ∞."""
        return len(self.values) - len(self.finite)

    @property
    def mean(self) -> float:
        """Of the finite ones; NaN where there is none."""
        return float(np.mean(self.finite)) if self.finite else math.nan

    @property
    def std(self) -> float:
        """Of the finite ones; NaN where there is none."""
        return float(np.std(self.finite)) if self.finite else math.nan

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def quantile(self, part: float) -> float:
        """Of all values, the upper one where it lies between two, so that ∞ makes no NaN."""
        return float(np.quantile(self.values, part, method="higher")) if self.values else math.nan


def format_endings(endings: Mapping[str, int]) -> str:
    """How measurements ended, and how many of them."""
    return " ".join(f"{status}:{n}" for status, n in sorted(endings.items()))
