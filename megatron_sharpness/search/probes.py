"""What has been probed of the loss along an update, and how a search ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

#: How a search ended; :class:`~megatron_sharpness.search.SearchResult` says what each means.
SearchStatus = Literal[
    "found", "not_descent", "no_upper", "no_lower", "noise_limited", "non_finite", "exhausted"
]

#: A loss stands out from L(θ) by more than so many times the noise of one loss. The difference of
#: two noisy losses has √2 of it, so that one in 400 that are level seems not to be; a bracket takes
#: two (tests/unit/search/test_random.py counts what comes of it).
STANDS_OUT = 4.0

#: A quadratic loss that falls no lower than to 0 has s·η_c ≤ 4·L(θ).
FLOOR = 4.0


@dataclass(frozen=True)
class Probe:
    """One evaluation: `loss` is L(θ - lr·Δθ)."""

    lr: float
    loss: float


@dataclass(frozen=True)
class Ending:
    """Why a search goes no further."""

    status: SearchStatus
    reason: str | None = None


@dataclass
class Probes:
    """The probes of one search: above L(θ), below it, or level with it to within the noise.

    Attributes:
        loss: L(θ).
        slope: s = ⟨g, Δθ⟩, None where it is not known.
        noise: root-mean-square error of one loss.
        made: every probe, in order.
    """

    loss: float
    slope: float | None = None
    noise: float = 0.0
    made: list[Probe] = field(default_factory=list)

    @property
    def margin(self) -> float:
        """By how much a loss is above or below L(θ) at least."""
        return STANDS_OUT * self.noise

    def change(self, probe: Probe) -> float:
        """L(θ - ηΔθ) - L(θ). A loss that is not finite is above."""
        return probe.loss - self.loss if math.isfinite(probe.loss) else math.inf

    def h(self, probe: Probe) -> float:
        """h(η) = (L(θ - ηΔθ) - L(θ))/η, which runs nearly straight from -s at 0 to 0 at η_c."""
        return self.change(probe) / probe.lr

    @property
    def above(self) -> list[float]:
        return [probe.lr for probe in self.made if self.change(probe) > self.margin]

    @property
    def below(self) -> list[float]:
        """Without noise, a loss equal to L(θ) is not raised, and so below."""
        return [probe.lr for probe in self.made if self.change(probe) <= -self.margin]

    @property
    def level(self) -> list[float]:
        """Neither, in order of η."""
        outer = {*self.above, *self.below}
        return sorted(probe.lr for probe in self.made if probe.lr not in outer)

    @property
    def upper(self) -> float | None:
        return min(self.above, default=None)

    @property
    def lower(self) -> float | None:
        """The largest below that lies under `upper`."""
        end = self.upper or math.inf
        return max((lr for lr in self.below if lr < end), default=None)

    @property
    def bracket(self) -> tuple[float, float] | None:
        lower, upper = self.lower, self.upper
        return None if lower is None or upper is None else (lower, upper)

    @property
    def ends(self) -> list[Probe]:
        """The probes of the bracket, the lower one first."""
        return [next(p for p in self.made if p.lr == eta) for eta in self.bracket or ()]

    @property
    def non_monotone(self) -> bool:
        """Whether one above lies under one below: the loss crosses L(θ) more than once."""
        return min(self.above, default=math.inf) < max(self.below, default=0.0)

    @property
    def finite(self) -> list[Probe]:
        """Those with a finite loss, in order of η."""
        return sorted((p for p in self.made if math.isfinite(p.loss)), key=lambda p: p.lr)

    @property
    def descent(self) -> float | None:
        """s > 0: as given, or -h(0) of the line through h at the two smallest η that stand out."""
        slope = self.slope
        if slope is None:
            seen = [p for p in self.finite if p.lr in (*self.above, *self.below)]
            if len(seen) < 2:
                return None
            a, b = seen[:2]
            slope = (self.h(b) - self.h(a)) / (b.lr / a.lr - 1) - self.h(a) if b.lr > a.lr else 0.0
        return slope if 0 < slope < math.inf else None

    def promised(self, eta: float) -> float:
        """The fall sη that the slope promises, as a part of |L(θ)|, or of the largest change seen
        where that is more, as of losses that are 0 in the mean; 0 where no slope is known."""
        scale = max(abs(self.loss), *(abs(self.change(p)) for p in self.finite), math.ulp(0.0))
        return (self.descent or 0.0) * eta / scale
