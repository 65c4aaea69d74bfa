"""Line search for the critical learning rate.

Along an update Δθ the loss is L(θ - ηΔθ), and the critical learning rate is the first step
that raises it,

    η_c = min{η > 0 : L(θ - ηΔθ) > L(θ)},    critical sharpness λ_c = 2/η_c

(Kalra et al., "A Scalable Measure of Loss Landscape Curvature for Analyzing the Training
Dynamics of LLMs", 2026, arXiv 2601.16979, Definition 2.1). The search knows floats and a
function only, and is deterministic: ranks that are given the same numbers take the same steps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Method = Literal["certified", "point", "bisection"]
SearchStatus = Literal[
    "found", "estimated", "not_descent", "no_upper", "no_lower", "non_finite", "exhausted"
]

# Farthest the search leaves the guess: a factor of 2^40, about 10^12.
_RANGE_LOG2 = 40
# A slope ≤ 0 says that the loss rises at first; it is believed once the loss is above L(θ) at
# these fractions of the guess.
_ASCENT_FRACTIONS = (2.0**-3, 2.0**-6, 2.0**-12)
# s·η_c of a typical language model in training, as a fraction of L(θ): what the first prediction
# goes by where the slope is not known.
_TYPICAL_FALL = 0.05
# How sure a prediction is, fitted to byte-level GPTs in training. Where s·η_c is the fraction f of
# L(θ), the distance from one probe to η_c is as predicted to within SPREAD·√f of it. The secant of
# two corrects itself by what the prior alone would not have, to within REST of that; where it
# corrects by more than the part MOST, the slope is not the loss's. Over the fraction
# NEARLY_QUADRATIC the loss is too far from quadratic to go by one probe.
_SPREAD = 1.3
_REST = 0.35
_MOST = 0.5
_NEARLY_QUADRATIC = 0.1
# A loss without a slope rises at once if it is seen to, about as steeply, from two probes this far
# apart. One that falls at first and rises as (η/η_c)^p is over 0.8 as steep for p < 0.07 alone; in
# the first steps of training p is 0.15, and later 1.
_FAR_APART, _AS_STEEP = 32.0, 0.8
_TINIEST = math.ulp(0.0)


@dataclass(frozen=True)
class Probe:
    """One evaluation: `loss` is L(θ - lr·Δθ)."""

    lr: float
    loss: float


@dataclass(frozen=True)
class SearchResult:
    """How a search for η_c ended.

    A probe is *above* if its loss is greater than L(θ) or not finite, else *below*; a loss
    equal to L(θ) is below.

    Attributes:
        lower: largest probe below that lies under `upper`; None if there is none.
        upper: smallest probe above; None if there is none.
        eta: η_c in [lower, upper] if the status is "found", predicted if "estimated", else None.
        error: relative standard uncertainty of `eta` if the status is "estimated", else None.
        evaluations: calls of `loss_at`.
        status:
            "found": L(lower) ≤ L(θ) < L(upper) and |1 - lower/upper| ≤ tolerance.
            "estimated": η_c is predicted with an uncertainty ≤ tolerance; no bracket is promised.
            "not_descent": slope ≤ 0, given or seen, and no decrease next to θ: η_c = 0, λ_c = ∞.
            "no_upper": the loss does not rise above L(θ) within a factor 2^40 of the guess.
            "no_lower": the loss does not fall to L(θ) within a factor 2^40 of the guess.
            "non_finite": L(θ) itself is NaN or infinite; nothing is evaluated.
            "exhausted": `max_evaluations` are spent, or no float is left between the two.
        non_monotone: a probe above lies under one below: the loss crosses L(θ) more than once,
            and the bracket is that of the smallest crossing seen.
        probes: every evaluation, in order.
    """

    lower: float | None
    upper: float | None
    eta: float | None
    error: float | None
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

    "bisection" is Algorithms 1 and 2 of the paper: double or halve from the guess until the
    loss crosses L(θ), at most 40 evaluations, then bisect; η_c is the middle.

    "certified" predicts η_c from the probes made so far, evaluates there, and closes the
    bracket with an evaluation one tolerance away on the other side: three evaluations where
    the prediction is right to within the tolerance. With the slope known one probe is enough
    for a prediction; without it one probe tells about how near η_c is, and two predict it.
    η_c is interpolated inside the bracket.

    "point" probes as "certified" does and ends, "estimated", at the first or second probe if the
    prediction's uncertainty is within the tolerance and it passes a check of itself: one probe
    lies within about a tolerance of the η_c that it predicts; two agree about η_c within twice
    the uncertainties that each states alone, and the secant of the two does not correct their
    prediction by over a half. Else, and without a slope, it goes on as "certified".

    Args:
        loss_at: η ↦ L(θ - ηΔθ), in nat.
        loss: L(θ), in nat.
        guess: first η to evaluate: the last η_c, or else the learning rate.
        slope: s = ⟨g, Δθ⟩, in nat per unit of η, with g the unclipped gradient of the same
            loss: L falls as -sη at first. A wrong slope can cost evaluations, and a slope ≤ 0
            that is contradicted by a decrease is ignored; the bracket is certified by
            evaluations alone. An estimate goes by the slope: one that is too small fails its
            check, one that is over half too large may pass it and be further off than is said.
        tolerance: relative width |1 - lower/upper| of the bracket, or uncertainty of an estimate,
            between 0 and 1.
        method: "certified", "point" or "bisection".
        max_evaluations: most calls of `loss_at`.

    Raises:
        ValueError: an argument is outside its range.
    """
    search = _Search(loss, guess, slope, tolerance, method, max_evaluations)
    while not isinstance(choice := search.choose(), str):
        search.add(Probe(choice, float(loss_at(choice))))
    return search.result()


def find_critical_lrs(
    losses_at: Callable[[float, Sequence[str]], Mapping[str, float]],
    *,
    losses: Mapping[str, float],
    guesses: Mapping[str, float],
    tolerance: float = 1 / 16,
    method: Method = "certified",
    max_evaluations: int = 40,
) -> dict[str, SearchResult]:
    """Bracket the critical learning rate of each of several losses along one update.

    Each loss has the search that :func:`find_critical_lr` would make for it without a slope, but
    an ascent is an answer here. A loss that was never below ends "not_descent" where it rises to
    two probes far apart about as steeply, or is above at 1/4096 of the guess too.

    The searches take turns, and what one asks for is evaluated for all whose own next η is so near
    that it does as well: within half a tolerance of a guess or a prediction, while an evaluation
    that is to close a bracket has its place.

    Args:
        losses_at: η and the names of losses ↦ their L(θ - ηΔθ), in nat.
        losses: L(θ) by name, in nat.
        guesses: first η to evaluate, by name.
        tolerance, method, max_evaluations: those of each search.

    Raises:
        ValueError: an argument is outside its range.
    """
    searches = {
        name: _Search(
            losses[name], guesses[name], None, tolerance, method, max_evaluations, may_ascend=True
        )
        for name in losses
    }
    while True:
        choices = {name: search.choose() for name, search in searches.items()}
        wanted = {name: eta for name, eta in choices.items() if not isinstance(eta, str)}
        if not wanted:
            return {name: search.result() for name, search in searches.items()}
        served = {
            eta: [name for name in wanted if searches[name].takes(eta, wanted[name])]
            for eta in wanted.values()
        }
        eta = max(served, key=lambda eta: len(served[eta]))
        for name, loss in losses_at(eta, served[eta]).items():
            searches[name].add(Probe(eta, float(loss)))


@dataclass
class _Search:
    """The probes so far, and the ways to choose the next η or to name the ending."""

    loss: float
    guess: float
    slope: float | None
    tolerance: float
    method: Method
    max_evaluations: int
    may_ascend: bool = False
    probes: list[Probe] = field(default_factory=list)
    lower: float | None = None
    upper: float | None = None
    farthest_below: float = 0.0
    widths: list[float] = field(default_factory=list)
    misses: int = 0  # windows in a row that were tried; over two, the prediction is wrong

    def __post_init__(self) -> None:
        _check(self.guess, self.tolerance, self.method, self.max_evaluations)
        self.choice: float | SearchStatus | None = None

    def choose(self) -> float | SearchStatus:
        """Next η to evaluate, or the ending; the same until a probe is added."""
        if self.choice is None:
            self.choice = self.chosen()
        return self.choice

    def chosen(self) -> float | SearchStatus:
        if not math.isfinite(self.loss):
            return "non_finite"
        if self.closed:
            return "found"
        choice = {"bisection": self.bisect, "certified": self.certify, "point": self.point}[
            self.method
        ]()
        if not isinstance(choice, str) and len(self.probes) >= self.max_evaluations:
            return "exhausted"
        return choice

    def takes(self, eta: float, wanted: float) -> bool:
        """Whether an evaluation at `eta` does as well as the one that is wanted."""
        # A move costs a small part of an evaluation, so that no evaluation is to be lost by it.
        goes_to_prediction = self.method != "bisection" and not self.misses
        return abs(math.log(eta / wanted)) <= (self.window / 2 if goes_to_prediction else 0.0)

    def result(self) -> SearchResult:
        status = self.choose()
        assert isinstance(status, str)
        eta: float | None = None
        error: float | None = None
        if status == "found":
            eta = self.middle if self.method == "bisection" else self.interpolate()
        elif status == "estimated" and (estimate := self.estimate()) is not None:
            eta, error = estimate
        return SearchResult(
            lower=self.lower,
            upper=self.upper,
            eta=eta,
            error=error,
            evaluations=len(self.probes),
            status=status,
            non_monotone=self.non_monotone,
            probes=tuple(self.probes),
        )

    def add(self, probe: Probe) -> None:
        self.choice = None
        self.probes.append(probe)
        above = [p.lr for p in self.probes if not self.loss >= p.loss > -math.inf]
        below = [p.lr for p in self.probes if self.loss >= p.loss > -math.inf]
        self.upper = min(above, default=None)
        self.lower = max((lr for lr in below if lr < min(above, default=math.inf)), default=None)
        self.farthest_below = max(below, default=0.0)
        if self.lower is not None and self.upper is not None:
            self.widths.append(math.log(self.upper) - math.log(self.lower))

    @property
    def closed(self) -> bool:
        if self.lower is None or self.upper is None:
            return False
        return abs(1 - self.lower / self.upper) <= self.tolerance

    @property
    def non_monotone(self) -> bool:
        return self.upper is not None and self.upper < self.farthest_below

    @property
    def window(self) -> float:
        """ln of the tolerance, just inside it, so that rounding does not leave a bracket open."""
        return -math.log1p(-self.tolerance) * (1 - 1e-9)

    @property
    def one_sided(self) -> SearchStatus:
        """The ending where one side of η_c was not met."""
        if self.upper is None:
            return "no_upper"
        return "not_descent" if self.slope is not None and self.slope <= 0 else "no_lower"

    @property
    def descent(self) -> float | None:
        """The slope, where it is one that a descent direction has."""
        return self.slope if self.slope is not None and 0 < self.slope < math.inf else None

    @property
    def ascends(self) -> bool:
        """Whether the loss rises from θ on: its slope says so, or else two probes above."""
        if self.slope is not None:
            return self.slope <= 0
        if not self.may_ascend or len(self.probes) < 2 or self.farthest_below:
            return False
        return estimate_slope(self.loss, self.probes) is None

    @property
    def rises_at_once(self) -> bool:
        """Whether the loss is seen to rise to the nearest probes about as steeply."""
        finite = sorted((p for p in self.probes if math.isfinite(p.loss)), key=lambda p: p.lr)
        farther = [p for p in finite if p.lr >= _FAR_APART * finite[0].lr * (1 - 1e-9)]
        if not self.may_ascend or not farther:
            return False
        (near, far) = ((p.loss - self.loss) / p.lr for p in (finite[0], farther[0]))
        return far < math.inf and _AS_STEEP * far <= near <= far / _AS_STEEP

    @property
    def middle(self) -> float:
        assert self.lower is not None and self.upper is not None
        return self.lower + (self.upper - self.lower) / 2

    def bisect(self) -> float | SearchStatus:
        """Next η of the paper's Algorithm 1 (exponential search) or 2 (binary search)."""
        if self.lower is not None and self.upper is not None:
            return self.between(self.middle)
        if self.lower is not None:
            eta = 2 * self.lower
        elif self.upper is not None:
            eta = self.upper / 2
        else:
            return self.guess
        in_range = len(self.probes) < _RANGE_LOG2 and 0 < eta < math.inf
        return eta if in_range else self.one_sided

    def certify(self) -> float | SearchStatus:
        """Next η that predicts η_c, certifies a prediction, or widens the search."""
        if not self.probes:
            return self.guess
        if self.ascends:
            doubt = self.doubt_descent()
            if doubt is not None:
                return doubt
        root = self.predict()
        if self.lower is not None and self.upper is not None:
            return self.inside(self.lower, self.upper, root)
        if self.upper is not None:
            return self.outside(self.upper, -1, root)
        return self.outside(self.farthest_below, 1, root)

    def point(self) -> float | SearchStatus:
        """Next η of `certify`, up to an estimate that is sure enough."""
        return "estimated" if self.estimate() is not None else self.certify()

    def doubt_descent(self) -> float | SearchStatus | None:
        """Next η that tests an ascent; None once a decrease nearer to θ contradicts it."""
        nearest = min(p.lr for p in self.probes)
        if self.rises_at_once:
            return "not_descent"
        if nearest == self.upper:
            smaller = (fraction * self.guess for fraction in _ASCENT_FRACTIONS)
            return next((eta for eta in smaller if 0 < eta < nearest), "not_descent")
        check = _ASCENT_FRACTIONS[1] * self.guess
        return check if len(self.probes) == 1 and check > 0 else None

    def inside(self, lower: float, upper: float, root: float | None) -> float | SearchStatus:
        """Next η inside the bracket: at the root, or a window from an end that is near to it."""
        low, high = math.log(lower), math.log(upper)
        middle = (low + high) / 2
        x = middle
        if root is not None and not self.kept_half(3) and high - low > 2 * self.window:
            # The secant creeps where the loss bends: go past the root to meet its other side.
            past = 2 if self.kept_half(2) else 1
            if root < middle:
                x = min(middle, low + self.reach(past * (root - low)))
            else:
                x = max(middle, high - self.reach(past * (high - root)))
        eta = _exp(x)
        return self.between(eta if lower < eta < upper else self.middle)

    def outside(self, known: float, sign: int, root: float | None) -> float | SearchStatus:
        """Next η on the side (sign) that is not met yet, with bounds that grow at each failure."""
        end = math.log(known)
        failed = len(self.probes) - 1
        longest = math.log(8 if self.descent is None else 64) * 2**failed
        shortest = self.window * 4 ** max(failed - 4, 0)
        step = longest if root is None else self.reach(sign * (root - end))
        step = min(max(step, shortest), longest)
        left = _RANGE_LOG2 * math.log(2) - abs(end - math.log(self.guess))
        eta = _exp(end + sign * min(step, left))
        return eta if left > 1e-9 and sign * (eta - known) > 0 else self.one_sided

    def kept_half(self, count: int) -> bool:
        """Whether the last `count` probes together left over half of the bracket."""
        return len(self.widths) > count and self.widths[-1] > self.widths[-1 - count] / 2

    def near(self, distance: float) -> bool:
        """Whether a window reaches that far, or nearly."""
        return distance <= 1.2 * self.window

    def reach(self, distance: float) -> float:
        """A step to the root, or the window that certifies one that is near."""
        if not self.near(distance):
            self.misses = 0
            return distance
        self.misses += 1
        return self.window * 4.0 ** min(max(self.misses - 2, 0), 20)

    def between(self, eta: float) -> float | SearchStatus:
        """η if it splits the bracket; no float does when the two are neighbours."""
        assert self.lower is not None and self.upper is not None
        return eta if self.lower < eta < self.upper else "exhausted"

    def predict(self) -> float | None:
        """ln of the predicted η_c: the secant of the deviations of the two best probes."""
        if self.descent is None and len(self.probes) == 1:
            return self.predict_typical()
        best = self.deviations()
        return best[0][0] - best[0][1] / _gain(best) if best else None

    def estimate(self) -> tuple[float, float] | None:
        """η_c and its relative standard uncertainty, if one or two probes are enough for both."""
        best = self.deviations() if self.descent is not None and self.loss > 0 else []
        if not 1 <= len(best) == len(self.probes) <= 2 or self.non_monotone:
            return None
        assert self.descent is not None
        x, deviation = best[0]
        eta = _exp(x - deviation / _gain(best))
        fall = self.descent * eta / self.loss
        spread = _SPREAD * math.sqrt(fall)
        if len(best) == 1:
            error = spread * abs(deviation)
            agrees = self.near(abs(deviation)) and fall <= _NEARLY_QUADRATIC
        else:
            other_x, other = best[1]
            correction = 1 / _gain(best) - 1
            error = _REST * abs(deviation) * math.hypot(correction, spread * other)
            apart = abs((x - deviation) - (other_x - other))
            agrees = apart <= 2 * spread * math.hypot(deviation, other)
            agrees = agrees and abs(correction) <= _MOST
        return (eta, error) if agrees and error <= self.tolerance else None

    def deviations(self) -> list[tuple[float, float]]:
        """(ln η, predicted ln(η/η_c)) of the one or two probes to go by, the nearer first."""
        finite = sorted((p for p in self.probes if math.isfinite(p.loss)), key=lambda p: p.lr)
        slope = self.descent or estimate_slope(self.loss, finite)
        if slope is None:
            return []
        points = [
            (math.log(probe.lr), deviation, probe.lr in (self.lower, self.upper))
            for probe in finite
            if (deviation := _deviation(self.loss, slope, probe)) is not None
        ]
        # The ends of a bracket, which interpolate, or else the probes nearest to the root.
        points.sort(key=lambda point: abs(point[1]))
        ends = [point for point in points if point[2]]
        best = ends if len(ends) == 2 else points[:2]
        if len(ends) == 1 and best[0] is not ends[0]:
            best = ends  # the loss bends back, and the secant would point away from the root
        return [(x, deviation) for x, deviation, _ in best]

    def predict_typical(self) -> float:
        """ln of the η_c that the first probe has on a quadratic loss of the typical slope."""
        probe = self.probes[0]
        rise = (probe.loss - self.loss) / (_TYPICAL_FALL * abs(self.loss) or _TINIEST)
        # Between a half and twice the probe: the second probe is to make a prediction.
        rise = min(max(rise, -0.25), 2.0) if math.isfinite(probe.loss) else 2.0
        return math.log(probe.lr) - math.log((1 + math.sqrt(1 + 4 * rise)) / 2)

    def interpolate(self) -> float:
        """η_c inside the bracket, by the line through (L(θ - ηΔθ) - L(θ))/η at its ends."""
        assert self.lower is not None and self.upper is not None
        losses = {probe.lr: probe.loss for probe in self.probes}
        h_lower = (losses[self.lower] - self.loss) / self.lower
        h_upper = (losses[self.upper] - self.loss) / self.upper
        part = 0.5
        if h_lower < h_upper < math.inf:
            part = min(-h_lower / (h_upper - h_lower), 1.0)
        return min(self.lower + part * (self.upper - self.lower), self.upper)


def _exp(x: float) -> float:
    """exp(x), kept to positive finite floats."""
    return max(math.exp(min(x, math.log(sys.float_info.max))), _TINIEST)


def _gain(points: list[tuple[float, float]]) -> float:
    """Slope of the deviation over ln η, which is 1 where the prediction is right."""
    if len(points) < 2 or points[0][0] == points[1][0]:
        return 1.0
    (x, deviation), (other_x, other) = points
    return min(max((other - deviation) / (other_x - x), 0.1), 10.0)


def estimate_slope(loss: float, probes: Iterable[Probe]) -> float | None:
    """s = -h(0) of the line through h(η) = (L(θ - ηΔθ) - L(θ))/η at the two smallest η, if > 0."""
    finite = sorted((p for p in probes if math.isfinite(p.loss)), key=lambda p: p.lr)
    if len(finite) < 2:
        return None
    a, b = finite[:2]
    h_a, h_b = (a.loss - loss) / a.lr, (b.loss - loss) / b.lr
    slope = (h_b - h_a) / (b.lr / a.lr - 1) - h_a if b.lr > a.lr else 0.0
    return slope if 0 < slope < math.inf else None


def _deviation(loss: float, slope: float, probe: Probe) -> float | None:
    """Predicted ln(η/η_c) of a probe, None where the slope cannot be right.

    With y = 1 + (L(θ - ηΔθ) - L(θ))/(sη), which is 1 at η_c, a quadratic loss has y = η/η_c.
    In general y ≈ (η/η_c)^p, and p is lower where the fall that the slope promises, sη/√y, is
    not small against L(θ), which a loss cannot fall below 0 from. The numbers are fitted to
    byte-level GPTs in training; they matter to the first prediction, the secant corrects the
    next.
    """
    y = 1 + (probe.loss - loss) / slope / probe.lr
    if not 0 < y < math.inf:
        return None
    v = math.log(y)
    drop = slope * probe.lr / loss / math.sqrt(y) if loss > 0 else 0.0
    least = 0.1 + 0.3 * abs(v) / (1 + abs(v))
    return v / (least + (1 - least) / (1 + 25 * drop * drop))


def predict_critical_lr(loss: float, slope: float | None, probe: Probe) -> float | None:
    """η_c as one probe predicts it, which may be of a part of the batch: where to begin a search.

    Args:
        loss: L(θ), in nat.
        slope: s = ⟨g, Δθ⟩, in nat per unit of η.
        probe: an evaluation on the line.

    Returns:
        η_c within a factor of 64 of the probe, or None if the slope is unknown or ≤ 0 or does not
        go with the probe.
    """
    if slope is None or not 0 < slope < math.inf or not math.isfinite(probe.loss):
        return None
    deviation = _deviation(loss, slope, probe)
    farthest = math.log(64)
    if deviation is None:
        return None
    return _exp(math.log(probe.lr) - min(max(deviation, -farthest), farthest))


def estimate_directional_sharpness(
    loss: float, slope: float | None, probes: Iterable[Probe], *, rounding: float = 2.0**-24
) -> float | None:
    """Directional sharpness λ_dir = ΔθᵀHΔθ/⟨g, Δθ⟩ from one probe of a search.

    L(θ - ηΔθ) = L(θ) - ηs + η²/2·ΔθᵀHΔθ + O(η³), so

        λ_dir ≈ 2(L(θ - ηΔθ) - L(θ) + ηs)/(sη²),

    exact where the loss is quadratic, and there equal to λ_c (Result 2.1). Used is the finite
    probe with the smallest η whose curvature term, the numerator, is at least 64 roundings of
    the losses; the error is O(η), so a probe at η ≪ η_c estimates better than one near η_c.

    Args:
        loss: L(θ), in nat.
        slope: s = ⟨g, Δθ⟩, in nat per unit of η.
        probes: evaluations on the line, in any order.
        rounding: unit roundoff of the type that the loss was computed in; fp32 by default.

    Returns:
        λ_dir in 1/η, or None if the slope is unknown or ≤ 0 or no probe is usable.
    """
    if slope is None or not 0 < slope < math.inf:
        return None
    for probe in sorted(probes, key=lambda p: p.lr):
        rise = probe.loss - loss + slope * probe.lr
        sharpness = 2 * rise / slope / probe.lr / probe.lr
        if not math.isfinite(sharpness):
            continue
        if abs(rise) >= 64 * rounding * max(abs(loss), abs(probe.loss)):
            return sharpness
    return None


def _check(guess: float, tolerance: float, method: str, max_evaluations: int) -> None:
    if not 0 < guess < math.inf:
        raise ValueError(
            f"guess={guess!r} is not a learning rate, which is positive and finite: "
            "pass the last critical learning rate, or the learning rate of the step"
        )
    if not 0 < tolerance < 1:
        raise ValueError(
            f"tolerance={tolerance!r} is not a relative width of a bracket: "
            "pass a number between 0 and 1, such as 1/16"
        )
    if method not in get_args(Method):
        raise ValueError(
            f"method={method!r} is not a method of this search: "
            f"pass one of {', '.join(map(repr, get_args(Method)))}"
        )
    if not isinstance(max_evaluations, int) or max_evaluations < 1:
        raise ValueError(
            f"max_evaluations={max_evaluations!r} leaves no evaluation to make: "
            "pass an integer of at least 1, such as 40"
        )
