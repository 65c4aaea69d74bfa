"""What has been probed of the loss along an update."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

#: A loss stands out from L(θ) by more than so many times the noise of one loss. The difference of
#: two noisy losses has √2 of it, so that one in 400 that are level seems not to be; a bracket takes
#: two (tests/core/search/test_random.py counts what comes of it).
STANDS_OUT = 4.0


@dataclass(frozen=True)
class Probe:
    """One evaluation: `loss` is L(θ - lr·Δθ)."""

    lr: float
    loss: float


@dataclass
class Probes:
    """The probes of one search: above L(θ), below it, or level with it to within the noise.

    Attributes:
        loss: L(θ).
        slope: s = ⟨g, Δθ⟩, None where it is not known.
        noise: root-mean-square error of one loss.
        resolution: η below which rounded weights do not follow the line.
        made: every probe, in order.
        above, below, level: where the loss is so. Without noise one equal to L(θ) is not raised,
            and so below.
    """

    loss: float
    slope: float | None = None
    noise: float = 0.0
    resolution: float = 0.0
    made: list[Probe] = field(default_factory=list)
    above: list[float] = field(default_factory=list)
    below: list[float] = field(default_factory=list)
    level: list[float] = field(default_factory=list)

    def add(self, probe: Probe) -> None:
        self.made.append(probe)
        above, below = self.change(probe) > self.margin, self.change(probe) <= -self.margin
        (self.above if above else self.below if below else self.level).append(probe.lr)

    def change(self, probe: Probe) -> float:
        """L(θ - ηΔθ) - L(θ). A loss that is not finite is above."""
        return probe.loss - self.loss if math.isfinite(probe.loss) else math.inf

    def h(self, probe: Probe) -> float:
        """h(η) = (L(θ - ηΔθ) - L(θ))/η, which runs nearly straight from -s at 0 to 0 at η_c."""
        return self.change(probe) / probe.lr

    @property
    def margin(self) -> float:
        """By how much a loss is above or below L(θ) at least."""
        return STANDS_OUT * self.noise

    @property
    def bracket(self) -> tuple[Probe | None, Probe | None]:
        """The largest below that lies under the smallest above, and that one."""
        upper = min(self.above, default=math.inf)
        lower = max((lr for lr in self.below if lr < upper), default=0.0)
        return self._at(lower), self._at(upper)

    def _at(self, eta: float) -> Probe | None:
        return next((probe for probe in self.made if probe.lr == eta), None)

    def promises(self, times: float) -> float:
        """η at which the slope promises a fall of so many times the noise; 0 if none is given."""
        given = self.descent if self.slope is not None else None
        return times * self.noise / (given or math.inf)

    @property
    def finite(self) -> list[Probe]:
        """Those with a finite loss, in order of η."""
        return sorted((p for p in self.made if math.isfinite(p.loss)), key=lambda p: p.lr)

    @property
    def descent(self) -> float | None:
        """s > 0: as given, or -h(0) of the line through h at the two smallest η that stand out."""
        slope, seen = self.slope, [p for p in self.finite if p.lr not in self.level]
        if slope is None and len(seen) > 1:
            slope = self.secant(*seen[:2])
        return slope if slope is not None and 0 < slope < math.inf else None

    def secant(self, a: Probe, b: Probe) -> float:
        """-h(0) of the line through h at two probes."""
        step = b.lr / a.lr - 1
        return (self.h(b) - self.h(a)) / step - self.h(a) if step > 0 else math.nan

    def promised(self, eta: float) -> float:
        """The fall sη that the slope promises, as a part of |L(θ)|, or of the largest change seen
        where that is more, as of losses that are 0 in the mean; 0 where no slope is known."""
        scale = max(abs(self.loss), *(abs(self.change(p)) for p in self.finite), math.ulp(0.0))
        return (self.descent or 0.0) * eta / scale

    def point(self, probe: Probe, slope: float) -> tuple[float, float] | None:
        """(ln η, ln y) with y = 1 + h(η)/s, η/η_c on a quadratic loss; None if there is none."""
        y = 1 + self.h(probe) / slope if slope else 0.0
        return (math.log(probe.lr), math.log(y)) if 0 < y < math.inf else None
