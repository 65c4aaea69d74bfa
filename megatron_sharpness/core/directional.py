"""Directional sharpness, read off the probes of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_sharpness.core.search import Probe, Probes

#: A curvature is read off a loss that it changes by so many times the noise.
CURVES_OUT = 16.0

#: A quadratic loss that falls no lower than to 0 has s·η_c ≤ 4·L(θ). Where it is more than this, as
#: in the first steps of training a large model, the loss is no quadratic by any means.
FAR = 32.0


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
    s·η_c > 32·L(θ), what a probe gives depends on where it was made, by orders of magnitude (seen:
    from 10^5 to 10 along one line): there the nearest to η_c is used, at whose scale λ_c is a
    curvature too.

    Args:
        loss: L(θ), in nat.
        slope: s = ⟨g, Δθ⟩, in nat per unit of η.
        probes: evaluations on the line, in any order.
        critical_lr: η_c, where it is known.
        noise: root-mean-square error of one loss, in nat.
        resolution: η below which rounded weights do not follow the line.

    Returns:
        λ_dir in 1/η, or None if the slope is unknown or ≤ 0 or no probe stands out so far.
    """
    if slope is None or not 0 < slope < math.inf:
        return None
    line = Probes(loss, slope, noise, made=list(probes))
    chosen = line.finite
    if critical_lr is not None and line.promised(critical_lr) > FAR:
        chosen.sort(key=lambda probe: abs(math.log(probe.lr / critical_lr)))
    for probe in chosen:
        rise = line.change(probe) + slope * probe.lr
        sharpness = 2 * rise / slope / probe.lr / probe.lr
        seen = probe.lr >= resolution and rise and abs(rise) >= CURVES_OUT * noise
        if seen and math.isfinite(sharpness):
            return sharpness
    return None
