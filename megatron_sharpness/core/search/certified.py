"""The certified search: predict η_c, step past it, and close the bracket from the other side."""

from __future__ import annotations

import math

from megatron_sharpness.core.search.prediction import PROMISED, predict
from megatron_sharpness.core.search.strategy import HIDDEN, MOST_LEVEL, Ending, Strategy

#: A window closes the bracket where it nearly reaches the prediction; past a farther one the step
#: goes by this part of a window. Both matter to the second decimal of the evaluations.
NEARLY, PAST = 1.25, 0.25
#: Farthest a search leaves its first probe.
RANGE = 2.0**40
#: A step outwards goes to where a quadratic loss ≥ 0 has crossed, s·η_c ≤ 4·L(θ), or by OUTWARDS.
#: In the first steps of a GPT of 124 M parameters s·η_c was 3500·L(θ); where it is not met by
#: BEYOND·L(θ), the line leads to where the loss does not rise.
FLOOR, OUTWARDS, BEYOND = 4.0, math.log(12), 1e6
#: An ascent is believed where the loss is above at these parts of the first probe, too; or where it
#: rises there as STEEPly as farther out. One that falls first and rises as η^(1 + p) later does so
#: for p < 0.05 alone, and in the first steps of training p is 0.15.
ASCENT, STEEP = (2.0**-6, 2.0**-12), 0.8


class Certified(Strategy):
    """Two evaluations where the first one is a window from η_c at most, three where it is not."""

    tries = 0  # predictions inside of the bracket since its middle was taken

    def inside(self, lower: float, upper: float) -> float:
        """Past the prediction, at most a window from the end that is nearer to it, or halfway."""
        low, high, margin = math.log(lower), math.log(upper), self.window / 50
        middle, root = (low + high) / 2, predict(self.probes)
        self.tries = (self.tries + 1) % 3
        if root is None or not self.tries:
            self.tries, x = 0, middle
        elif root < middle:
            x = low + self.reach(root - low)
        else:
            x = high - self.reach(high - root)
        return math.exp(x if low + margin < x < high - margin else middle)

    def outside(self) -> float | Ending:
        """On the side that is not met yet, in steps that grow while it is not."""
        probes, made = self.probes, [probe.lr for probe in self.probes.made]
        out, count = not probes.above, len(made)
        if out:
            sign, end, known = 1, max(made), max(probes.below, default=max(made))
        else:
            sign, end, known = -1, min(made), min(probes.above)
        if (eta := self.ascent(min(made)) or self.hopeless(out, end, known)) is not None:
            return eta
        root, grown = predict(probes), 4.0 ** max(0, count - 2)
        if root is None:
            ahead = math.log(4) * max(1, count - 1)
        else:  # from what is known, and on from losses that are level
            ahead = self.reach(sign * (root - math.log(known)), grown) - abs(math.log(end / known))
        if ahead < self.window / 50 or (root is not None and out and not probes.below):
            ahead = self.window * grown / 2
        if out and (promised := probes.promised(end)):
            ahead = min(ahead, max(math.log(FLOOR / promised), OUTWARDS))
            if promised > PROMISED and (count > 2 or not self.guessed):
                ahead = max(ahead, OUTWARDS)
        if not out and probes.slope is None and probes.noise:
            ahead = min(ahead, OUTWARDS)
        eta = end * math.exp(min(sign * ahead, 700.0))
        return eta if out else self.in_sight(eta, known)

    def in_sight(self, eta: float, upper: float) -> float:
        """An η below an upper end, and not so near to θ that no fall can be seen."""
        hidden, resolution = self.probes.promises(HIDDEN), self.probes.resolution
        end = min([upper, *self.probes.level])
        nearest = max(math.sqrt(hidden) * math.sqrt(end), resolution if resolution < end else 0.0)
        return max(eta, nearest)

    def hopeless(self, out: bool, end: float, known: float) -> Ending | None:
        """Why the other side of η_c will not be met."""
        probes = self.probes
        if out and (promised := probes.promised(end)) > BEYOND:
            reason = f"the slope promises a fall by {promised:.0e}·L(θ), and nothing has risen yet"
            return Ending("no_upper", f"at η = {end:.3g} {reason}")
        hidden = probes.noise and known * (1 - self.tolerance) <= probes.promises(HIDDEN)
        if not out and (hidden or len(probes.level) > MOST_LEVEL):
            return Ending("noise_limited")
        if 1 / RANGE < end / self.start < RANGE:
            return None
        return Ending("no_upper" if out else "no_lower", "the search left its range")

    def ascent(self, nearest: float) -> float | Ending | None:
        """The next η that tests whether the loss rises from θ on; None where it does not."""
        probes, first = self.probes, len(self.probes.made) == 1
        if probes.slope is None:
            rises = self.may_ascend and not (first or probes.below or probes.descent)
        else:
            rises = probes.slope <= 0 and (first or nearest not in probes.below)
        if not rises:
            return None
        smaller = [part * self.start for part in ASCENT if 0 < part * self.start < nearest]
        if nearest in probes.above and (finite := probes.finite) and finite[0].lr == nearest:
            near, far = probes.h(finite[0]), probes.h(finite[-1])
            if STEEP * far <= near <= far / STEEP and nearest <= ASCENT[0] * finite[-1].lr:
                return Ending("not_descent")
        if smaller and nearest not in probes.level:
            return smaller[0]
        unclear = probes.slope is None and nearest in probes.level
        return Ending("noise_limited" if unclear else "not_descent")

    def reach(self, distance: float, grown: float = 1.0) -> float:
        """A step past what lies at a distance, or the window that closes the bracket there."""
        self.closing = distance <= NEARLY * self.window
        return self.window * grown if self.closing else distance + PAST * self.window * grown
