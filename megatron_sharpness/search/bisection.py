"""The paper's search: Algorithm 1 (double or halve until the loss crosses) and 2 (bisect)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sharpness.search.certified import MOST_LEVEL, beside_level, split
from megatron_sharpness.search.probes import Ending, Probes

#: Most evaluations of Algorithm 1.
DOUBLINGS = 40


@dataclass
class Bisection:
    """Where to probe next; the attributes are those of the certified search."""

    probes: Probes
    start: float
    window: float
    closing: bool = True

    def next(self) -> float | Ending:
        """η to evaluate, or why there is none."""
        probes = self.probes
        if not probes.made:
            return self.start
        if probes.bracket:
            lower, upper = probes.bracket
            if any(lower < eta < upper for eta in probes.level):
                return beside_level(probes, lower, upper, self.window)
            return split(lower, upper, lower + (upper - lower) / 2)
        made = [probe.lr for probe in probes.made]
        eta = min(made) / 2 if probes.above else 2 * max(made)
        if probes.above and probes.noise and len(probes.level) > MOST_LEVEL:
            return Ending("noise_limited")
        if len(made) < DOUBLINGS and 0 < eta < math.inf:
            return eta
        if not probes.above:
            return Ending("no_upper")
        ascends = probes.slope is not None and probes.slope <= 0
        return Ending("not_descent" if ascends else "no_lower")
