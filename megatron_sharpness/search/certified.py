"""The certified search: predict η_c, step past it, and close the bracket from the other side."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sharpness.search.prediction import PROMISED, predict
from megatron_sharpness.search.probes import FLOOR, Ending, Probes

#: A window closes the bracket where it nearly reaches the prediction; past a farther one the step
#: goes by this part of a window. Both matter to the second decimal of the evaluations.
NEARLY, PAST = 1.25, 0.25
#: Farthest a search leaves its first probe.
RANGE = 40 * math.log(2)
#: A step outwards goes to where a quadratic loss must have crossed (FLOOR) at most, or by OUTWARDS.
#: In the first steps of a GPT of 124 M parameters s·η_c was 3500·L(θ); where it is not met by
#: BEYOND·L(θ), the line leads to where the loss does not rise.
OUTWARDS, BEYOND = math.log(12), 1e6
#: After more losses that are level with L(θ) than this, the noise is what ends the search.
MOST_LEVEL = 3
#: An ascent is believed where the loss is above at these parts of the first probe, too; or, without
#: a slope, where it rises to two probes FAR_APART about as STEEP. One that falls at first and then
#: rises as (η/η_c)^p does so for p < 0.07 alone, and in the first steps of training p is 0.15.
ASCENT, FAR_APART, STEEP = (2.0**-6, 2.0**-12), 32.0, 0.8


@dataclass
class Certified:
    """Where to probe next.

    Attributes:
        probes: what has been probed.
        start: η of the first probe.
        guessed: it is near η_c, for all that is known, and not just where the loss can be seen.
        window: ln of the width that the bracket is to have.
        may_ascend: without a slope, a loss may also rise from θ on.
        closing: the last η is where it closes the bracket: another one near it does not do as well.
    """

    probes: Probes
    start: float
    window: float
    guessed: bool = True
    may_ascend: bool = False
    closing: bool = False
    tries: int = 0  # predictions inside the bracket since its middle was taken

    def next(self) -> float | Ending:
        """η to evaluate, or why there is none."""
        self.closing = False
        if not self.probes.made:
            return self.start
        if self.probes.bracket:
            return self.inside(*self.probes.bracket)
        return self.ascent() or self.outside()

    def inside(self, lower: float, upper: float) -> float | Ending:
        """Past the prediction, at most a window from the end that is nearer to it, or halfway."""
        low, high, window = math.log(lower), math.log(upper), self.window
        if any(lower < eta < upper for eta in self.probes.level):
            return beside_level(self.probes, lower, upper, window)
        middle, root = (low + high) / 2, predict(self.probes)
        x, self.tries = middle, self.tries + 1
        if root is None or self.tries > 2:
            self.tries = 0
        elif root < middle:
            x = low + self.reach(root - low)
        else:
            x = high - self.reach(high - root)
        if not low + window / 50 < x < high - window / 50:
            x = middle
        return split(lower, upper, math.exp(x))

    def outside(self) -> float | Ending:
        """Next η on the side that is not met yet, in steps that grow while it is not."""
        probes = self.probes
        out, made = probes.upper is None, [probe.lr for probe in probes.made]
        sign, end = (1, max(made)) if out else (-1, min(made))
        if ending := self.one_sided(out, end):
            return ending
        anchor = math.log((max(probes.below, default=end)) if out else probes.upper or end)
        root, grown = predict(probes), 4.0 ** max(0, len(made) - 2)
        blind = math.log(4) * max(1, len(made) - 1)
        step = blind if root is None else self.reach(sign * (root - anchor), grown)
        at = math.log(end)
        beyond = sign * (anchor - at) + min(step, math.log(64) * 2 ** len(made))
        if beyond <= 0:  # what lies there is level: go on from it
            beyond = self.window * grown / 2
        if out and (promised := probes.promised(end)):
            beyond = min(beyond, max(math.log(FLOOR / promised), OUTWARDS))
            if promised > PROMISED and (len(made) > 2 or not self.guessed):
                beyond = max(beyond, OUTWARDS)
        left = RANGE - abs(at - math.log(self.start))
        eta = _exp(at + sign * min(beyond, left))
        if left > 1e-9 and sign * (eta - end) > 0:
            return eta
        return Ending("no_upper" if out else "no_lower", "the search left its range, 2^40")

    def one_sided(self, out: bool, end: float) -> Ending | None:
        """Why the other side of η_c will not be met."""
        probes = self.probes
        if out and (promised := probes.promised(end)) > BEYOND:
            return Ending(
                "no_upper",
                f"at η = {end:.3g} the loss is still not above L(θ), where the slope alone "
                f"promises a fall of {promised:.0e}·L(θ)",
            )
        hidden = 0 < (probes.descent or 0.0) * end <= probes.margin
        hidden = hidden or len(probes.level) > MOST_LEVEL
        return Ending("noise_limited") if not out and probes.noise and hidden else None

    def ascent(self) -> float | Ending | None:
        """Next η that tests whether the loss rises from θ on; None where it does not."""
        probes = self.probes
        nearest = min(probe.lr for probe in probes.made)
        if probes.slope is None:
            if not self.may_ascend or len(probes.made) < 2 or probes.below or probes.descent:
                return None
            if nearest in probes.level:
                return Ending("noise_limited")
            if self.rises_at_once():
                return Ending("not_descent")
        elif not probes.slope <= 0 or (len(probes.made) > 1 and nearest in probes.below):
            return None
        smaller = (part * self.start for part in ASCENT if part * self.start < nearest)
        eta = next(smaller, 0.0)
        return eta if eta > 0 and nearest not in probes.level else Ending("not_descent")

    def rises_at_once(self) -> bool:
        near = self.probes.finite[0]
        slopes = [
            self.probes.h(p) for p in self.probes.finite if p.lr >= FAR_APART * near.lr * (1 - 1e-9)
        ]
        return bool(slopes) and STEEP <= self.probes.h(near) / slopes[0] <= 1 / STEEP

    def reach(self, distance: float, grown: float = 1.0) -> float:
        """A step past what lies at a distance, or the window that closes the bracket there."""
        self.closing = distance <= NEARLY * self.window
        return self.window * grown if self.closing else distance + PAST * self.window * grown


def beside_level(probes: Probes, lower: float, upper: float, window: float) -> float | Ending:
    """Next η between an end of the bracket and the losses inside it that are level with L(θ)."""
    level = [math.log(eta) for eta in probes.level if lower < eta < upper]
    low, first, last, high = math.log(lower), level[0], level[-1], math.log(upper)
    # Half a window on either side of them; and where one end is so near, a window from it.
    x = (first + last + window) / 2
    if high <= x:
        x = high - window
    if len(level) > MOST_LEVEL or not (low < x < first or last < x):
        return Ending("noise_limited")
    return split(lower, upper, math.exp(x))


def split(lower: float, upper: float, eta: float) -> float | Ending:
    """η if it splits the bracket, else the middle; no float does where the two are neighbours."""
    if not lower < eta < upper:
        eta = lower + (upper - lower) / 2
    return eta if lower < eta < upper else Ending("exhausted", "no float is left in the bracket")


def _exp(x: float) -> float:
    """exp(x) among the positive finite floats."""
    return min(max(math.exp(min(x, 709.0)), math.ulp(0.0)), 1.7e308)
