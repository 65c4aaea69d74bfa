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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_sharpness.core.search.bisection import Bisection
from megatron_sharpness.core.search.certified import Certified
from megatron_sharpness.core.search.interpolation import interpolate, middle
from megatron_sharpness.core.search.probes import Probe, Probes
from megatron_sharpness.core.search.strategy import VISIBLE, Ending, SearchStatus, Strategy

__all__ = [
    "TOLERANCES",
    "Method",
    "Probe",
    "Probes",
    "SearchResult",
    "SearchStatus",
    "find_critical_lr",
    "find_critical_lrs",
    "first_probe",
]

Method = Literal["certified", "bisection"]
_STRATEGIES: dict[str, type[Strategy]] = {"certified": Certified, "bisection": Bisection}

#: Width of the bracket by default. Interpolated in 1/4, η_c is as good as the middle of 1/16.
TOLERANCES: dict[Method, float] = {"certified": 1 / 4, "bisection": 1 / 16}


@dataclass(frozen=True)
class SearchResult:
    """How a search for η_c ended.

    A probe is *above* or *below* if its loss differs from L(θ) by more than four times the noise,
    else *level*. A loss that is not finite is above; without noise one equal to L(θ) is below.

    Attributes:
        lower: largest probe below that lies under `upper`; None if there is none.
        upper: smallest probe above; None if there is none.
        eta: η_c in [lower, upper] if the status is "found", else None.
        error: relative standard uncertainty of `eta`, of the interpolation and of the noise.
        evaluations: calls of `loss_at`.
        status:
            "found": L(lower) ≤ L(θ) < L(upper), both by more than the noise, and
                |1 - lower/upper| ≤ tolerance.
            "not_descent": slope ≤ 0, given or seen, and no decrease next to θ: η_c = 0, λ_c = ∞.
            "no_upper": the loss does not rise above L(θ) within a factor 2^40 of the first probe,
                or where the slope alone promises a fall of 10^6·L(θ).
            "no_lower": the loss does not fall to L(θ) within a factor 2^40 of the first probe.
            "noise_limited": the loss cannot be told from L(θ) where the bracket would have to end.
            "non_finite": L(θ) itself is NaN or infinite; nothing is evaluated.
            "exhausted": `max_evaluations` are spent, or no float is left between the two.
        reason: what was seen, where the status does not say it all.
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
    reason: str | None
    non_monotone: bool
    probes: tuple[Probe, ...]


def find_critical_lr(
    loss_at: Callable[[float], float],
    *,
    loss: float,
    guess: float,
    slope: float | None = None,
    noise: float = 0.0,
    resolution: float = 0.0,
    tolerance: float | None = None,
    method: Method = "certified",
    max_evaluations: int = 40,
    farthest: float = math.inf,
) -> SearchResult:
    """Bracket the critical learning rate between two evaluated learning rates.

    "bisection" is Algorithms 1 and 2 of the paper: double or halve from the guess until the
    loss crosses L(θ), at most 40 evaluations, then bisect; η_c is the middle.

    "certified" predicts η_c from the probes made so far, evaluates past the prediction, and closes
    the bracket with an evaluation one tolerance away on the other side: two evaluations where the
    guess is right to within the tolerance. With the slope known one probe is enough for a
    prediction; without it one probe tells about how near η_c is, and two predict it. η_c is
    interpolated inside the bracket.

    Args:
        loss_at: η ↦ L(θ - ηΔθ), in nat.
        loss: L(θ), in nat.
        guess: first η to evaluate: the last η_c, or else the learning rate. Where the slope
            promises no fall there that stands out from the noise, the first η is farther out.
        slope: s = ⟨g, Δθ⟩, in nat per unit of η, with g the unclipped gradient of the same
            loss: L falls as -sη at first. A wrong slope can cost evaluations, and a slope ≤ 0
            that is contradicted by a decrease is ignored; the bracket is certified by
            evaluations alone. One that is many orders of magnitude too large ends in "no_upper".
        noise: root-mean-square error of one loss, in nat.
        resolution: η below which rounded weights do not follow the line: the first η is no nearer.
        tolerance: relative width |1 - lower/upper| of the bracket, between 0 and 1; by default
            that of the method in `TOLERANCES`.
        method: "certified" or "bisection".
        max_evaluations: most calls of `loss_at`.
        farthest: no η beyond it is evaluated: a loss that has not risen there ends in "no_upper".

    Raises:
        ValueError: an argument is outside its range.
    """
    options = _checked(guess, noise, tolerance, method, max_evaluations)
    start = min(first_probe(guess, slope, noise, resolution), farthest)
    search = _STRATEGIES[method](
        Probes(loss, slope, noise, resolution), start, *options, start == guess, farthest=farthest
    )
    while not isinstance(eta := search.ask(), Ending):
        search.tell(eta, loss_at(eta))
    return _result(search, eta, method)


def find_critical_lrs(
    losses_at: Callable[[float, Sequence[str]], Mapping[str, float]],
    *,
    losses: Mapping[str, float],
    guesses: Mapping[str, float],
    noises: Mapping[str, float] | None = None,
    resolution: float = 0.0,
    tolerance: float | None = None,
    method: Method = "certified",
    max_evaluations: int = 40,
) -> dict[str, SearchResult]:
    """Bracket the critical learning rate of each of several losses along one update.

    Each loss has the search that :func:`find_critical_lr` would make for it without a slope, but
    an ascent is an answer here: a loss that was never below ends "not_descent" where it is above at
    1/4096 of the guess too.

    The searches take turns, and what one asks for is evaluated for all whose own next η is so near
    that it does as well: within half a tolerance of a guess or a prediction, while an evaluation
    that is to close a bracket has its place.

    Args:
        losses_at: η and the names of losses ↦ their L(θ - ηΔθ), in nat.
        losses: L(θ) by name, in nat.
        guesses: first η to evaluate, by name.
        noises: root-mean-square error of one loss by name, in nat; 0 where it is left out.
        resolution, tolerance, method, max_evaluations: those of each search.

    Raises:
        ValueError: an argument is outside its range.
    """
    searches: dict[str, Strategy] = {}
    for name, loss in losses.items():
        noise = (noises or {}).get(name, 0.0)
        options = _checked(guesses[name], noise, tolerance, method, max_evaluations)
        probes, start = Probes(loss, None, noise, resolution), max(guesses[name], resolution)
        searches[name] = _STRATEGIES[method](probes, start, *options, may_ascend=True)
    while True:
        asked = {name: search.ask() for name, search in searches.items()}
        wanted = {name: eta for name, eta in asked.items() if not isinstance(eta, Ending)}
        if not wanted:
            return {name: _result(searches[name], asked[name], method) for name in searches}
        served = {
            eta: [name for name in wanted if searches[name].takes(eta, wanted[name])]
            for eta in wanted.values()
        }
        eta = max(served, key=lambda eta: len(served[eta]))
        for name, loss in losses_at(eta, served[eta]).items():
            searches[name].tell(eta, loss)


def first_probe(guess: float, slope: float | None, noise: float, resolution: float = 0.0) -> float:
    """The guess, or where the loss can be seen to follow the line, if that is farther."""
    visible = Probes(math.nan, slope, noise).promises(VISIBLE)
    return max(guess, resolution, visible if visible < math.inf else 0.0)


def _result(search: Strategy, ending: float | Ending, method: Method) -> SearchResult:
    assert isinstance(ending, Ending)
    probes, (lower, upper) = search.probes, search.probes.bracket
    eta: float | None = None
    error: float | None = None
    if ending.status == "found" and lower and upper:
        certified = method == "certified"
        eta, error = interpolate(probes, lower, upper) if certified else middle(lower, upper)
    crosses_again = min(probes.above, default=math.inf) < max(probes.below, default=0.0)
    return SearchResult(
        lower=lower.lr if lower else None,
        upper=upper.lr if upper else None,
        eta=eta,
        error=error,
        evaluations=len(probes.made),
        status=ending.status,
        reason=ending.reason,
        non_monotone=crosses_again,
        probes=tuple(probes.made),
    )


def _checked(
    guess: float, noise: float, tolerance: float | None, method: Method, max_evaluations: int
) -> tuple[float, int]:
    """Tolerance and most evaluations of a search."""
    for name, value, right, what in (
        ("guess", guess, 0 < guess < math.inf, "a positive, finite learning rate"),
        ("noise", noise, 0 <= noise < math.inf, "a finite root-mean-square error, such as 0"),
        ("tolerance", tolerance, tolerance is None or 0 < tolerance < 1, "1/4, or so"),
        ("method", method, method in _STRATEGIES, f"one of {', '.join(_STRATEGIES)}"),
        ("max_evaluations", max_evaluations, max_evaluations % 1 == 0 < max_evaluations, "40"),
    ):
        if not right:
            raise ValueError(f"{name}={value!r} is none to search with: pass {what}")
    return tolerance or TOLERANCES[method], max_evaluations
