"""Where η_c seems to be, from few probes. It says where to probe next, and never enters a result:

the constants here are fitted to byte-level GPTs in training and matter to the number of evaluations
alone (tests/core/search/test_constants.py has each of them off by a factor of 3).
"""

from __future__ import annotations

import math

from megatron_sharpness.core.search.probes import Probe, Probes

#: s·η_c as a part of L(θ), for the first probe of a loss whose slope is not known.
TYPICAL_FALL = 0.05
#: y = 1 + h(η)/s grows as (η/η_c)^p, with p = 1 where the loss is quadratic. It can fall no further
#: than to 0: p is halfway down to LEAST_POWER where the slope promises a fall of HALF_AT of L(θ).
LEAST_POWER, HALF_AT = 0.3, 0.2
#: A secant of two probes may correct p by this factor.
MOST_CORRECTED = 5.0
#: Where the loss has not bent yet, y is taken to be this much at least.
UNBENT = 1 / 32
#: Where the slope promises a fall of this part of L(θ) it says little of what lies farther out.
PROMISED = 0.25


def predict(probes: Probes) -> float | None:
    """ln of η_c as predicted, or None where the probes do not say."""
    slope, (lower, upper) = probes.descent, probes.bracket
    if slope is None:
        first = probes.slope is None and len(probes.made) == 1
        return _typical(probes, probes.made[0]) if first else None
    if lower and upper and probes.promised(lower.lr) > PROMISED:
        return _beyond(probes, lower, upper)
    deviations = {p: d for p in probes.finite if (d := _deviation(probes, p, slope)) is not None}
    if not deviations and probes.finite:
        # Next to θ y is 0 to within the noise: η_c is taken to be as near as that leaves open.
        farthest = probes.finite[-1]
        unsure = probes.margin / farthest.lr / slope
        deviations[farthest] = math.log(min(max(unsure, UNBENT), 1.0))
    ends = [probe for probe in (lower, upper) if probe in deviations]
    best = sorted(ends if len(ends) == 2 else deviations, key=lambda p: abs(deviations[p]))[:2]
    if not best:
        return None
    x, deviation = math.log(best[0].lr), deviations[best[0]]
    step = math.log(best[-1].lr) - x
    power = (deviations[best[-1]] - deviation) / step if step else 1.0
    corrected = min(max(power, 1 / MOST_CORRECTED), MOST_CORRECTED) if power > 0 else 1.0
    return x - deviation / corrected


def _deviation(probes: Probes, probe: Probe, slope: float) -> float | None:
    """ln(η/η_c) as one probe predicts it, None where it does not to within the noise."""
    point = probes.point(probe, slope)
    if point is None or point[1] < math.log(probes.margin / probe.lr / slope or math.ulp(0.0)):
        return None
    fall = min(probes.promised(probe.lr) * math.exp(-point[1] / 2) / HALF_AT, 1e9)
    return point[1] / (LEAST_POWER + (1 - LEAST_POWER) / (1 + fall**2))


def _beyond(probes: Probes, lower: Probe, upper: Probe) -> float | None:
    """ln of the η_c of a loss that has fallen at first, and rises in between as η² does."""
    fall, rise = abs(probes.change(lower)), probes.change(upper)
    if not 0 < fall + rise < math.inf:
        return None
    squared = 1 + ((upper.lr / lower.lr) ** 2 - 1) * fall / (fall + rise)
    return math.log(lower.lr) + math.log(squared) / 2


def _typical(probes: Probes, probe: Probe) -> float:
    """ln of the η_c that one probe has on a quadratic loss with the typical slope.

    It stays between a half and 1.6 times the probe: the second one is to make a prediction.
    """
    rise = probes.change(probe) / (TYPICAL_FALL * abs(probes.loss) or math.ulp(0.0))
    return math.log(probe.lr) - math.log((1 + math.sqrt(1 + 4 * min(max(rise, -0.235), 2.0))) / 2)
