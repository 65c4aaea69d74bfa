"""Where η_c seems to be, from few probes. It says where to probe next, and never enters a result:

the constants here are fitted to byte-level GPTs in training and matter to the number of evaluations
alone (tests/unit/search/test_constants.py has each of them off by a factor of 3).
"""

from __future__ import annotations

import math

from megatron_sharpness.search.probes import Probes

#: s·η_c as a part of L(θ), for the first probe of a loss whose slope is not known.
TYPICAL_FALL = 0.05
#: y = 1 + h(η)/s grows as (η/η_c)^p, with p = 1 where the loss is quadratic. It can fall no further
#: than to 0: p is halfway down to LEAST_POWER where the slope promises a fall of HALF_AT of L(θ).
LEAST_POWER, HALF_AT = 0.3, 0.2
#: A secant of two probes may correct p by this factor.
MOST_CORRECTED = 5.0
#: Where the slope promises a fall of this part of L(θ) it says little of what lies farther out.
PROMISED = 0.25


def predict(probes: Probes) -> float | None:
    """ln of η_c as predicted, or None where the probes do not say."""
    if not probes.finite:
        return math.log(probes.made[0].lr) - math.log(2)
    slope = probes.descent
    if slope is None:
        return _typical(probes) if probes.slope is None and len(probes.finite) == 1 else None
    if probes.bracket and probes.promised(probes.bracket[0]) > PROMISED:
        return _beyond(probes, *probes.bracket)
    points = sorted(_deviations(probes, slope), key=lambda point: abs(point[1]))
    ends = [point for point in points if point[2] in (probes.bracket or ())]
    best = ends if len(ends) == 2 else points[:2]
    if not best:
        return None
    x, deviation, _ = best[0]
    power = 1.0
    if len(best) == 2 and best[1][0] != x:
        power = (best[1][1] - deviation) / (best[1][0] - x)
        power = min(max(power, 1 / MOST_CORRECTED), MOST_CORRECTED) if power > 0 else 1.0
    return x - deviation / power


def _deviations(probes: Probes, slope: float) -> list[tuple[float, float, float]]:
    """(ln η, ln(η/η_c) as one probe predicts it, η) of the probes that agree with the slope."""
    found = []
    for probe in probes.finite:
        # Next to θ y is 0 to within the noise; η_c is no farther than what that noise leaves open.
        unsure = probes.margin / (slope * probe.lr) if probes.margin else 0.0
        y = 1 + probes.h(probe) / slope
        if y > -unsure and 0 < (y := max(y, unsure)) < math.inf:
            fall = min(probes.promised(probe.lr) / math.sqrt(y) / HALF_AT, 1e9)
            power = LEAST_POWER + (1 - LEAST_POWER) / (1 + fall**2)
            found.append((math.log(probe.lr), math.log(y) / power, probe.lr))
    return found


def _beyond(probes: Probes, lower: float, upper: float) -> float | None:
    """ln of the η_c of a loss that has fallen at first, and rises in between as η² does."""
    fall, rise = (abs(probes.change(probe)) for probe in probes.ends)
    if not 0 < fall + rise < math.inf:
        return None
    times = upper / lower
    return math.log(lower) + math.log1p((times - 1) * (times + 1) * fall / (fall + rise)) / 2


def _typical(probes: Probes) -> float:
    """ln of the η_c that one probe has on a quadratic loss with the typical slope.

    It stays between a half and twice the probe: the second one is to make a prediction.
    """
    (probe,) = probes.finite
    rise = probes.change(probe) / (TYPICAL_FALL * abs(probes.loss) or math.ulp(0.0))
    return math.log(probe.lr) - math.log((1 + math.sqrt(1 + 4 * min(max(rise, -0.25), 2.0))) / 2)
