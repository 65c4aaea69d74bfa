"""η_c inside of its bracket, and how sure it is."""

from __future__ import annotations

import math

from megatron_sharpness.core.search.probes import Probe, Probes

#: A line through ln y over ln η is out by its curvature, of which a third probe shows a mean: the
#: uncertainty allows for p to change by so much of itself for each factor of e besides,
BENT = 0.4
#: by so many times p where s, too, is only read off the probes,
BENT_UNKNOWN = 0.8
#: and by so much of ln p, which is 0 on a quadratic loss: one that is flat, or steep, has kinks.
#: On the GPTs of benchmarks/landscapes.py nine of ten errors then lie within twice what is stated.
BENT_POWER = 0.7
#: A loss that grows exponentially about η_c, as over a batch that is being memorized, is bent by
#: p·s·η_c/L(θ): allowed for is this part of it.
EXPONENTIAL = 0.5
#: What a weight on the grid of its precision lags behind by, as a part of the resolution.
HALF_STEP = 0.25


def interpolate(probes: Probes, near: Probe, far: Probe) -> tuple[float, float]:
    """η_c in the bracket of two probes, and its relative standard uncertainty.

    With y = 1 + h(η)/s, which is 1 at η_c and (η/η_c)^p for a loss of that power (p = 1 if it is
    quadratic), ln y is interpolated over ln η, by a line of slope p. Between its ends a and b the
    line is out by ½·|d²ln y/d(ln η)²|·ln(η_c/a)·ln(b/η_c), and ln η_c by 1/p of that; the curvature
    is that of the nearest other probe, or else p(1 - p), and what is not seen of it is what the
    constants say, up to what the middle of the bracket is out by. The noise adds
    √2·noise/(s·η_c·p), and weights that do not follow a line shorter than the resolution, half a
    step of theirs.
    """
    others = [probe for probe in probes.finite if probe not in (near, far)]
    # The slope that is known, or of a line through h at the two ends if they do not go with it.
    for slope in (probes.descent or 0.0, probes.secant(near, far)):
        a, b = probes.point(near, slope), probes.point(far, slope)
        if a and b and a[1] < b[1]:
            break
    else:
        return middle(near, far)
    power = (b[1] - a[1]) / (b[0] - a[0])
    x = min(max(a[0] - a[1] / power, a[0]), b[0])
    points = [point for probe in others if (point := probes.point(probe, slope))]
    curvature = 1 - power
    for c in sorted(points, key=lambda point: -abs(point[0] - x)):
        if min(abs(c[0] - a[0]), abs(c[0] - b[0])) > 1e-6:  # the nearest one stands
            curvature = 2 * ((c[1] - a[1]) / (c[0] - a[0]) - power) / (c[0] - b[0]) / power
    unseen = BENT_UNKNOWN * power if probes.slope is None else BENT
    eta = min(max(math.exp(x), near.lr), far.lr)
    # A loss that is 0 or negative has no scale of its own.
    promised = min(slope * eta / probes.loss, 1e9) if probes.loss > 0 else 0.0
    grown = EXPONENTIAL * power * promised
    bent = math.hypot(curvature, unseen, BENT_POWER * math.log(power), grown)
    bend = min(bent * (x - a[0]) * (b[0] - x) / 2, middle(near, far)[1])
    noise = math.sqrt(2) * probes.noise / (slope * eta * power)
    return eta, math.hypot(bend, noise, HALF_STEP * probes.resolution / eta)


def middle(near: Probe, far: Probe) -> tuple[float, float]:
    """The middle of the bracket, with the standard deviation of what is uniform in it, relative."""
    eta = near.lr + (far.lr - near.lr) / 2
    return eta, (far.lr - near.lr) / eta / math.sqrt(12)
