"""λ_c^{1→2} as a number also where the search ended without one, and its spread over batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: The loss rises at once, or never.
_ENDINGS = {"not_descent": math.inf, "no_lower": math.inf, "no_upper": 0.0}


def relative_sharpness(
    status: str, critical_sharpness: float | None, critical_lr_lower: float | None = None
) -> float | None:
    """λ_c^{1→2} of a record, in [0, ∞]; None where it was not measured.

    A loss whose noise hides η_c, and that was never seen to fall, rises at once as far as that
    lets one tell.
    """
    if status == "noise_limited" and critical_lr_lower is None:
        return math.inf
    return _ENDINGS.get(status) if critical_sharpness is None else critical_sharpness


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
