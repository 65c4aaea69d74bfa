"""What the probes of a search say: η_c inside its bracket with its uncertainty, and λ_dir."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_sharpness.search.probes import Probe, Probes

#: A line through ln y over ln η is out by its curvature, which a third probe shows but as a mean:
#: the uncertainty allows for 0.3 of a power of change for each factor of e besides.
BENT = 0.3
#: A curvature is read off a loss that it changes by so many times the noise.
CURVES_OUT = 16.0

#: A loss is as good as quadratic up to η_c where it has this power there at least; 1 is quadratic.
NEARLY_QUADRATIC = 0.25


def interpolate(probes: Probes) -> tuple[float, float]:
    """η_c in the bracket, and its relative standard uncertainty.

    With y = 1 + h(η)/s, which is 1 at η_c and (η/η_c)^p for a loss of that power (p = 1 if it is
    quadratic), ln y is interpolated over ln η in a line of slope p. Between its ends a and b the
    line is out by ½·|d²ln y/d(ln η)²|·ln(η_c/a)·ln(b/η_c), and by p times that much in ln η_c; the
    curvature is that of the nearest other probe, or else 1 - p. The noise adds √2·noise/(s·η_c·p).
    """
    assert probes.bracket is not None
    lower, upper = probes.bracket
    near, far = probes.ends
    slope = probes.descent or 0.0
    a, b = _point(probes, slope, near), _point(probes, slope, far)
    if a is None or b is None or not a[1] < b[1]:  # of a line through h at the two ends
        slope = (probes.h(far) - probes.h(near)) / (upper / lower - 1) - probes.h(near)
        a, b = _point(probes, slope, near), _point(probes, slope, far)
    if a is None or b is None or not a[1] < b[1]:
        return middle(probes)
    power = (b[1] - a[1]) / (b[0] - a[0])
    x = min(max(a[0] - a[1] / power, a[0]), b[0])
    others = [_point(probes, slope, p) for p in probes.finite if p not in (near, far)]
    apart = [c for c in others if c and min(abs(c[0] - a[0]), abs(c[0] - b[0])) > 1e-6]
    curvature = 1 - power
    if apart:
        c = min(apart, key=lambda point: abs(point[0] - x))
        curvature = 2 * ((c[1] - a[1]) / (c[0] - a[0]) - power) / (c[0] - b[0]) / power
    bend = math.hypot(curvature, BENT) * (x - a[0]) * (b[0] - x) / 2
    eta = min(max(math.exp(x), lower), upper)
    return eta, math.hypot(bend, math.sqrt(2) * probes.noise / (slope * eta * power))


def _point(probes: Probes, slope: float, probe: Probe) -> tuple[float, float] | None:
    """(ln η, ln y) of a probe, None where there is no such number."""
    y = 1 + probes.h(probe) / slope if slope else 0.0
    return (math.log(probe.lr), math.log(y)) if 0 < y < math.inf else None


def middle(probes: Probes) -> tuple[float, float]:
    """The middle of the bracket, with the standard deviation of what is uniform in it, relative."""
    assert probes.bracket is not None
    lower, upper = probes.bracket
    eta = lower + (upper - lower) / 2
    return eta, (upper - lower) / eta / math.sqrt(12)


def estimate_directional_sharpness(
    loss: float,
    slope: float | None,
    probes: Sequence[Probe],
    *,
    critical_lr: float | None = None,
    noise: float = 0.0,
    resolution: float = 0.0,
) -> float | None:
    """Directional sharpness λ_dir = ΔθᵀHΔθ/⟨g, Δθ⟩ from one probe of a search.

    L(θ - ηΔθ) = L(θ) - ηs + η²/2·ΔθᵀHΔθ + O(η³), so

        λ_dir ≈ 2(L(θ - ηΔθ) - L(θ) + ηs)/(sη²),

    exact where the loss is quadratic, and there equal to λ_c (Result 2.1). Used is the finite
    probe with the smallest η whose curvature term, the numerator's bracket, is CURVES_OUT times the
    noise; the error is O(η), so that a probe at η ≪ η_c estimates better than one near η_c. Where
    y ≈ (η/η_c)^p at η_c with p < 1/4, as in the first steps of training, the loss is no quadratic:
    what a probe gives there depends on where it was made, by orders of magnitude.

    Args:
        loss: L(θ), in nat.
        slope: s = ⟨g, Δθ⟩, in nat per unit of η.
        probes: evaluations on the line, in any order.
        critical_lr: η_c, where it is known.
        noise: root-mean-square error of one loss, in nat.
        resolution: η below which rounded weights do not follow the line.

    Returns:
        λ_dir in 1/η, or None if the slope is unknown or ≤ 0, no probe stands out so far, or the
        loss is not nearly quadratic.
    """
    if slope is None or not 0 < slope < math.inf:
        return None
    made = Probes(loss, slope, noise, list(probes))
    if critical_lr is not None and _power(made, slope, critical_lr) < NEARLY_QUADRATIC:
        return None
    for probe in made.finite:
        rise = made.change(probe) + slope * probe.lr
        sharpness = 2 * rise / slope / probe.lr / probe.lr
        seen = probe.lr >= resolution and rise and abs(rise) >= CURVES_OUT * noise
        if seen and math.isfinite(sharpness):
            return sharpness
    return None


def _power(probes: Probes, slope: float, critical_lr: float) -> float:
    """p of y ≈ (η/η_c)^p, by the probe nearest to η_c that is apart from it."""
    x = math.log(critical_lr)
    points = [_point(probes, slope, probe) for probe in probes.finite]
    apart = [(abs(p[0] - x), p[1] / (p[0] - x)) for p in points if p and abs(p[0] - x) > 0.01]
    return min(apart, default=(0.0, 1.0))[1]
