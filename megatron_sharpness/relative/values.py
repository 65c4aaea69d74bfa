"""λ_c^{1→2} as a number also where the search ended without one."""

from __future__ import annotations

import math

#: The loss rises at once, as far as its noise lets one tell, or never.
_ENDINGS = {
    "not_descent": math.inf,
    "no_lower": math.inf,
    "noise_limited": math.inf,
    "no_upper": 0.0,
}


def relative_sharpness(status: str, critical_sharpness: float | None) -> float | None:
    """λ_c^{1→2} of a record, in [0, ∞]; None where it was not measured."""
    return _ENDINGS.get(status) if critical_sharpness is None else critical_sharpness
