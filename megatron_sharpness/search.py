"""Line search for the critical learning rate.

Along an update Δθ the loss is L(θ - ηΔθ), and the critical learning rate is the first step
that raises it,

    η_c = min{η > 0 : L(θ - ηΔθ) > L(θ)},    critical sharpness λ_c = 2/η_c

(Kalra et al., "A Scalable Measure of Loss Landscape Curvature for Analyzing the Training
Dynamics of LLMs", 2026, arXiv 2601.16979, Definition 2.1). The search knows floats and a
function only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

Method = Literal["certified", "bisection"]
SearchStatus = Literal["found", "not_descent", "no_upper", "no_lower", "non_finite", "exhausted"]

# The search leaves the guess by at most this factor (10^12), the paper's 40 doublings.
_RANGE = 2.0**40
# Below guess/2^12 a slope ≤ 0 is believed.
_ASCENT_RANGE = 2.0**12
QN=1;K8=8;K7=.22;GE=GI=1;K6=8;IQ=0;K1=1.2;K2=4;K3=3;K5=2;ENDS=True


@dataclass(frozen=True)
class Probe:
    """One evaluation: `loss` is L(θ - lr·Δθ)."""

    lr: float
    loss: float


@dataclass(frozen=True)
class SearchResult:
    """How a search for η_c ended.

    status: "found": `lower` and `upper` are probes with L(lower) ≤ L(θ) < L(upper) and
            |1 - lower/upper| ≤ tolerance, and no probe above L(θ) lies under `lower`.
            "not_descent": slope ≤ 0 and no decrease next to θ: η_c = 0.
            "no_upper": the loss never rises above L(θ) within 2^40 of the guess.
            "no_lower": the loss never falls to L(θ) within 2^40 of the guess.
            "non_finite": L(θ) itself is NaN or infinite; nothing was evaluated.
            "exhausted": `max_evaluations` are spent, or no float is left inside the bracket.
    lower, upper: the tightest bracket known, whatever the status; None where none is known.
    eta:    η_c inside [lower, upper] if the status is "found", else None.
    non_monotone: a probe above L(θ) lies under one that is not: the loss crosses L(θ) several
            times, and `lower`, `upper` belong to the smallest crossing seen.
    probes: every evaluation, in order. A non-finite loss counts as above L(θ).
    """

    lower: float | None
    upper: float | None
    eta: float | None
    evaluations: int
    status: SearchStatus
    non_monotone: bool
    probes: tuple[Probe, ...]


def find_critical_lr(
    loss_at: Callable[[float], float],
    *,
    loss: float,
    guess: float,
    slope: float | None = None,
    tolerance: float = 1 / 16,
    method: Method = "certified",
    max_evaluations: int = 40,
) -> SearchResult:
    """Bracket the critical learning rate between two evaluated learning rates.

    Args:
        loss_at: η ↦ L(θ - ηΔθ), in nat; called once per evaluation.
        loss: L(θ).
        guess: first η to try: the last η_c, or the learning rate.
        slope: s = ⟨g, Δθ⟩ with g the unclipped gradient of the same loss, in nat per unit of
            η: L falls as -sη at first. A wrong slope costs evaluations, never a wrong bracket.
        tolerance: relative width |1 - lower/upper| of the bracket.
        method: "certified" predicts η_c from the probes (and the slope, if given) and then
            certifies it from both sides; "bisection" is the paper's Algorithms 1 and 2.
        max_evaluations: most calls of `loss_at`.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(guess, tolerance, method, max_evaluations)
    search = _Search(loss, guess, slope, tolerance, [], [])
    status: SearchStatus
    while True:
        if not math.isfinite(loss):
            status = "non_finite"
            break
        if search.closed:
            status = "found"
            break
        step = search.bisect() if method == "bisection" else search.certify()
        if isinstance(step, str):
            status = step
            break
        if len(search.probes) == max_evaluations:
            status = "exhausted"
            break
        search.add(Probe(step, float(loss_at(step))))
    return SearchResult(
        lower=search.lower,
        upper=search.upper,
        eta=search.estimate(method) if status == "found" else None,
        evaluations=len(search.probes),
        status=status,
        non_monotone=search.non_monotone,
        probes=tuple(search.probes),
    )


@dataclass
class _Search:
    """The probes so far, and the two ways to choose the next."""

    loss: float
    guess: float
    slope: float | None
    tolerance: float
    probes: list[Probe]
    widths: list[float]

    def add(self, probe: Probe) -> None:
        self.probes.append(probe)
        if self.lower is not None and self.upper is not None:
            self.widths.append(math.log(self.upper) - math.log(self.lower))

    def above(self, probe: Probe) -> bool:
        return not (math.isfinite(probe.loss) and probe.loss <= self.loss)

    @property
    def upper(self) -> float | None:
        return min((p.lr for p in self.probes if self.above(p)), default=None)

    @property
    def lower(self) -> float | None:
        upper = math.inf if self.upper is None else self.upper
        return max((p.lr for p in self.probes if p.lr < upper), default=None)

    @property
    def non_monotone(self) -> bool:
        below = (p.lr for p in self.probes if not self.above(p))
        return self.upper is not None and self.upper < max(below, default=0.0)

    @property
    def closed(self) -> bool:
        lower, upper = self.lower, self.upper
        if lower is None or upper is None:
            return False
        return abs(1 - lower / upper) <= self.tolerance

    def missing(self) -> SearchStatus:
        """Name the side of η_c that no probe has shown."""
        if self.upper is None:
            return "no_upper"
        return "not_descent" if self.slope is not None and self.slope <= 0 else "no_lower"

    def bisect(self) -> float | SearchStatus:
        """Next η of the paper's Algorithm 1 (double or halve), then 2 (bisect)."""
        lower, upper = self.lower, self.upper
        if lower is not None and upper is not None:
            middle = lower + (upper - lower) / 2
            return middle if lower < middle < upper else "exhausted"
        if lower is None and upper is None:
            return self.guess
        eta = 2 * lower if lower is not None else cast(float, upper) / 2
        return eta if len(self.probes) < 40 and 0 < eta < math.inf else self.missing()

    def certify(self) -> float | SearchStatus:
        if not self.probes:
            return self.guess
        if self.slope is not None and self.slope <= 0:
            smallest = min(self.probes, key=lambda p: p.lr)
            depth = self.guess / smallest.lr
            if self.above(smallest):
                if depth >= _ASCENT_RANGE:
                    return "not_descent"
                down = self.guess / (8 if depth < 8 else depth**2)
                return down if 0 < down < smallest.lr else "not_descent"
            if len(self.probes) == 1 and self.guess / 64 > 0:
                return self.guess / 64
        lower, upper = self.lower, self.upper
        window = -math.log1p(-self.tolerance) * (1 - 1e-9)
        root = self.predict()
        if lower is not None and upper is not None:
            lo, hi = math.log(lower), math.log(upper)
            stalled = len(self.widths) > K5 and self.widths[-1] > self.widths[-1-K5] / 2
            x = (lo + hi) / 2
            if root is not None and not stalled:
                sign, end = (1, lo) if root < x else (-1, hi)
                distance = self.stride(sign * (root - end), window)
                if 2 * distance < hi - lo and 2 * window < hi - lo:
                    x = end + sign * distance
            eta = math.exp(x)
            if not lower < eta < upper:
                eta = lower + (upper - lower) / 2
            return eta if lower < eta < upper else "exhausted"
        known = lower if lower is not None else cast(float, upper)
        sign = 1 if lower is not None else -1
        end = math.log(known)
        longest = math.log(K6 if self.slope is not None and self.slope>0 else K8) * 2 ** (len(self.probes) - 1)
        if root is None:
            distance = K7 if len(self.probes) == 1 and self.slope is None else longest
        else:
            distance = self.stride(sign * (root - end), window)
        distance = min(longest,max(distance, window * K2 ** max(len(self.probes) - K3, 0)))
        limit = math.log(self.guess) + sign * math.log(_RANGE)
        if sign * (limit - end) < 1e-9:
            return self.missing()
        x = end + sign * min(distance, sign * (limit - end))
        eta = max(math.exp(min(x, 709.78)), math.ulp(0.0))
        return eta if sign * (eta - known) > 0 else self.missing()

    def stride(self, distance: float, window: float) -> float:
        return distance if distance > K1 * window else window

    def predict(self) -> float | None:
        """ln of the predicted η_c."""
        finite = sorted((p for p in self.probes if math.isfinite(p.loss)), key=lambda p: p.lr)
        slope = self.slope
        if slope is None or not 0 < slope < math.inf:
            if len(finite) < 2:
                return None
            a, b = finite[:2]
            ha, hb = (a.loss - self.loss) / a.lr, (b.loss - self.loss) / b.lr
            slope = a.lr * (hb - ha) / (b.lr - a.lr) - ha
            if not 0 < slope < math.inf:
                return None
        points = []
        for p in finite:
            y = 1 + (p.loss - self.loss) / slope / p.lr
            if not 0 < y < math.inf:
                continue
            v = math.log(y)
            floor = 0.1 + 0.3 * abs(v) / (1 + abs(v))
            q = slope * p.lr / self.loss / math.sqrt(y) if self.loss > 0 and (QN or self.slope) else 0.0
            power = floor + (1 - floor) / (1 + 25 * q * q)
            points.append((math.log(p.lr), v / power))
        points.sort(key=lambda point: abs(point[1]))
        if not points:
            return None
        ends = [q for q in points if q[0] in (math.log(self.lower or 1e-99),math.log(self.upper or 1e-99))]
        if len(ends)==2 and ENDS: points = sorted(ends, key=lambda point: abs(point[1]))+[q for q in points if q not in ends]
        x, w = points[0]
        gain = 1.0
        if len(points) > 1 and points[1][0] != x:
            gain = min(max((points[1][1] - w) / (points[1][0] - x), 0.1), 10.0)
            if w*points[1][1]>0: gain=gain**GE
            else: gain=gain**GI
        if IQ and len(points) > 2:
            (x0,w0),(x1,w1),(x2,w2)=points[:3]
            if len({w0,w1,w2})==3 and (w1-w0)*(x1-x0)>0 and (w2-w0)*(x2-x0)>0:
                r=x0*w1*w2/((w0-w1)*(w0-w2))+x1*w0*w2/((w1-w0)*(w1-w2))+x2*w0*w1/((w2-w0)*(w2-w1))
                d=r-(x-w/gain)
                if abs(d)<abs(w/gain)*IQ: return r
        return x - w / gain

    def estimate(self, method: Method) -> float:
        lower, upper = cast(float, self.lower), cast(float, self.upper)
        if method == "bisection":
            return lower + (upper - lower) / 2
        root = self.predict()
        eta = math.sqrt(lower) * math.sqrt(upper) if root is None else math.exp(root)
        return min(max(eta, lower), upper)


def estimate_directional_sharpness(
    loss: float, slope: float | None, probes: Sequence[Probe]
) -> float | None:
    """Directional sharpness λ_dir = ΔθᵀHΔθ/⟨g, Δθ⟩ from the probe nearest to θ.

    With L(θ - ηΔθ) ≈ L(θ) - ηs + η²/2·ΔθᵀHΔθ, λ_dir ≈ 2(L(θ - ηΔθ) - L(θ) + ηs)/(sη²).
    """
    if slope is None or not 0 < slope < math.inf:
        return None
    for probe in sorted(probes, key=lambda p: p.lr):
        rise = probe.loss - loss + slope * probe.lr
        if math.isfinite(rise) and abs(rise) > 1e-6 * abs(loss):
            return 2 * rise / (slope * probe.lr) / probe.lr
    return None


def _check(guess: float, tolerance: float, method: str, max_evaluations: int) -> None:
    if not 0 < guess < math.inf:
        raise ValueError(
            f"guess={guess!r} is not a learning rate: pass a positive finite number, "
            "such as the last critical learning rate or the learning rate of the step"
        )
    if not 0 < tolerance < 1:
        raise ValueError(
            f"tolerance={tolerance!r} is not a relative width: pass a number between 0 and 1, "
            "such as 1/16"
        )
    if method not in ("certified", "bisection"):
        raise ValueError(f'method={method!r} is unknown: pass "certified" or "bisection"')
    if not isinstance(max_evaluations, int) or max_evaluations < 1:
        raise ValueError(
            f"max_evaluations={max_evaluations!r} leaves nothing to search with: "
            "pass an integer of at least 1"
        )
