"""What the probes of a search say: η_c inside its bracket with its uncertainty, and λ_dir."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_sharpness.search.probes import FLOOR, Probe, Probes

#: A line through ln y over ln η is out by its curvature, which a third probe shows but as a mean:
#: the uncertainty allows for 0.3 of a power of change for each factor of e besides.
BENT = 0.3
#: A curvature is read off a loss that it changes by so many times the noise.
CURVES_OUT = 16.0


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
    if not math.isfinite(far.loss):
        return middle(probes)
    slope = probes.descent
    if slope is None or 1 + probes.h(near) / slope <= 0:  # of a line through h at the two ends
        slope = (probes.h(far) - probes.h(near)) / (upper / lower - 1) - probes.h(near)

    def point(probe: Probe) -> tuple[float, float] | None:
        y = 1 + probes.h(probe) / slope
        return (math.log(probe.lr), math.log(y)) if y > 0 else None

    (x_a, y_a), (x_b, y_b) = ends = [at for at in (point(near), point(far)) if at is not None]
    power = (y_b - y_a) / (x_b - x_a)
    x = min(max(x_a - y_a / power, x_a), x_b)
    others = [at for p in probes.finite if (at := point(p)) is not None and at not in ends]
    curvature = 1 - power
    if others:
        x_c, y_c = min(others, key=lambda at: abs(at[0] - x))
        curvature = 2 * ((y_c - y_a) / (x_c - x_a) - power) / (x_c - x_b) / power
    bend = math.hypot(curvature, BENT) * (x - x_a) * (x_b - x) / 2
    eta = min(max(math.exp(x), lower), upper)
    return eta, math.hypot(bend, math.sqrt(2) * probes.noise / (slope * eta * power))


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
    s·η_c > 4·L(θ), as in the first steps of training, no quadratic loss with a floor of 0 is meant:
    what one probe gives there depends on where it was made, by orders of magnitude.

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
    if critical_lr is not None and slope * critical_lr > FLOOR * loss > 0:
        return None
    for probe in sorted(probes, key=lambda probe: probe.lr):
        rise = probe.loss - loss + slope * probe.lr
        sharpness = 2 * rise / slope / probe.lr / probe.lr
        seen = probe.lr >= resolution and rise and abs(rise) >= CURVES_OUT * noise
        if seen and math.isfinite(sharpness):
            return sharpness
    return None
