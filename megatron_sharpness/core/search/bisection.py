"""The paper's search: Algorithm 1 (double or halve until the loss crosses) and 2 (bisect)."""

from __future__ import annotations

from megatron_sharpness.core.search.strategy import MOST_LEVEL, Ending, Strategy

#: Most evaluations of Algorithm 1.
DOUBLINGS = 40


class Bisection(Strategy):
    """Five or six evaluations where the first one is near to η_c."""

    def inside(self, lower: float, upper: float) -> float:
        self.closing = True
        return lower + (upper - lower) / 2

    def outside(self) -> float | Ending:
        self.closing = True
        probes, made = self.probes, [probe.lr for probe in self.probes.made]
        if probes.above and len(probes.level) > MOST_LEVEL:
            return Ending("noise_limited")
        if len(made) < DOUBLINGS:
            return min(made) / 2 if probes.above else 2 * max(made)
        ascends = probes.slope is not None and probes.slope <= 0
        return Ending("no_upper" if not probes.above else "not_descent" if ascends else "no_lower")
