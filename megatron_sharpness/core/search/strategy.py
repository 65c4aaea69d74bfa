"""A search in progress: it is asked for the next η, told the loss there, and knows its ending."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from megatron_sharpness.core.search.probes import STANDS_OUT, Probe, Probes

#: How a search ended; :class:`~megatron_sharpness.core.search.SearchResult` says what each means.
SearchStatus = Literal[
    "found", "not_descent", "no_upper", "no_lower", "noise_limited", "non_finite", "exhausted"
]

#: Where the slope promises a fall of VISIBLE times the noise, what is left of it is known to a few
#: percent (STANDS_OUT/VISIBLE), and with it how far η_c is; at HIDDEN times no fall is seen.
VISIBLE, HIDDEN = 100.0, 2 * STANDS_OUT

#: After more losses that are level with L(θ) than this, the noise is what ends a search.
MOST_LEVEL = 3


@dataclass(frozen=True)
class Ending:
    """Why a search goes no further."""

    status: SearchStatus
    reason: str | None = None


@dataclass
class Strategy(ABC):
    """One search. A subclass says where to probe next.

    Attributes:
        probes: what has been probed.
        start: η of the first probe.
        tolerance: relative width of the bracket.
        most: evaluations at most.
        guessed: η_c is near `start`, for all that is known.
        may_ascend: without a slope, a loss may also rise from θ on.
        farthest: no η beyond it is asked for.
        closing: the η asked for is to close the bracket: another one near it does not do as well.
    """

    probes: Probes
    start: float
    tolerance: float
    most: int
    guessed: bool = True
    may_ascend: bool = False
    farthest: float = math.inf
    closing: bool = False
    asked: float | Ending | None = None

    @abstractmethod
    def inside(self, lower: float, upper: float) -> float:
        """The next η between the ends of a bracket; the middle is taken if it is not in there."""

    @abstractmethod
    def outside(self) -> float | Ending:
        """The next η where there is no bracket yet, or why there will be none."""

    @property
    def window(self) -> float:
        """ln of the width that the bracket is to have, less what rounding may add to it."""
        return -math.log1p(-self.tolerance) * (1 - 1e-9)

    def ask(self) -> float | Ending:
        """The next η to evaluate, or the ending; the same until the loss there is told."""
        if self.asked is None:
            self.closing = False
            self.asked = self._next()
            if not isinstance(self.asked, Ending) and len(self.probes.made) >= self.most:
                self.asked = Ending("exhausted", f"{self.most} evaluations were made")
        return self.asked

    def tell(self, eta: float, loss: float) -> None:
        """The loss at an η."""
        self.asked = None
        self.probes.add(Probe(eta, float(loss)))

    def takes(self, eta: float, instead: float) -> bool:
        """Whether an evaluation at an η does as well as the one that is asked for."""
        # A move costs a small part of an evaluation, so that no evaluation is to be lost by it.
        return abs(math.log(eta / instead)) <= (0.0 if self.closing else self.window / 2)

    def _next(self) -> float | Ending:
        lower, upper = self.probes.bracket
        if not math.isfinite(self.probes.loss):
            return Ending("non_finite")
        if not self.probes.made:
            return self.start
        if lower and upper:
            return self._between(lower.lr, upper.lr)
        eta = self.outside()
        if not isinstance(eta, Ending):
            eta = min(max(eta, math.ulp(0.0)), sys.float_info.max, self.farthest)
        if eta == self.farthest and eta in [probe.lr for probe in self.probes.made]:
            return Ending("no_upper", f"nothing rises up to η = {eta:.3g}, the farthest asked")
        if eta in [probe.lr for probe in self.probes.made]:
            return Ending("no_lower" if upper else "no_upper", "no float is left")
        return eta

    def _between(self, lower: float, upper: float) -> float | Ending:
        if abs(1 - lower / upper) <= self.tolerance:
            return Ending("found")
        level = sorted(math.log(eta) for eta in self.probes.level if lower < eta < upper)
        if not level:
            eta = self.inside(lower, upper)
        else:  # half a window on either side of them, or a window from an end that is so near
            x = (level[0] + level[-1] + self.window) / 2
            x = math.log(upper) - self.window if math.log(upper) <= x else x
            if len(level) > MOST_LEVEL or level[0] <= x <= level[-1] or x <= math.log(lower):
                return Ending("noise_limited")
            eta = math.exp(x)
        if not lower < eta < upper:
            eta = lower + (upper - lower) / 2
        return eta if lower < eta < upper else Ending("exhausted", "no float is left in between")
