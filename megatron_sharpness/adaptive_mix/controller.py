"""A training mix that follows the losses which break first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sharpness.core.errors import SettingError


@dataclass
class MixController:
    """Keeps the share of one kind of data where the relative critical sharpness of two tasks meets.

    The largest learning rate that raises neither loss is 2/max(λ_gains, λ_loses), and it is largest
    where the two are equal. The more of the data there is, the smaller is λ of the task that gains
    by it and the larger that of the other, so that the share is to grow while λ_gains > λ_loses.
    After every ``every`` measurements

        r ← clip(r + clip(gain · mean ln(λ_gains/λ_loses), −rate, rate), lower, upper).

    It is a rule of thumb: what the paper (arXiv 2601.16979, Section 5) finds by a sweep before a
    run is followed during the run. The sharpness of a loss that rises at once is ∞, and of one that
    never rises 0: a factor beyond all bounds counts as a step of ``rate``.

    Attributes:
        share: r, the part of the data in [0, 1], to begin with and now.
        gains: the task whose loss this data is good for.
        loses: the other task.
        every: measurements that an adjustment averages over.
        lower, upper: bounds of the share.
        rate: largest change at one adjustment.
        gain: change for a factor e between the two.

    Raises:
        SettingError: a value cannot be used; the message names it, the reason and the remedy.
    """

    share: float
    gains: str
    loses: str
    every: int = 5
    lower: float = 0.05
    upper: float = 0.95
    rate: float = 0.05
    gain: float = 0.1
    seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("share", "lower", "upper", "rate"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise SettingError(name, value, "a share of the data lies between 0 and 1")
        if not self.lower <= self.share <= self.upper:
            raise SettingError(
                "share", self.share, f"give one within its bounds, {self.lower} and {self.upper}"
            )
        if self.every < 1:
            raise SettingError("every", self.every, "a number of measurements; give 1 or more")
        if not 0.0 < self.gain < math.inf:
            raise SettingError("gain", self.gain, "give a positive number, such as 0.1")

    def observe(self, sharpness: Mapping[str, float]) -> bool:
        """Take in λ_c^{1→2} by task, ∞ where a loss rises at once, and adjust the share if due.

        A measurement without both tasks is not one that counts.

        Returns:
            Whether the share was adjusted.
        """
        gains, loses = sharpness.get(self.gains), sharpness.get(self.loses)
        if gains is None or loses is None:
            return False
        self.seen.append(self._wish(gains, loses))
        if len(self.seen) < self.every:
            return False
        change = sum(self.seen) / len(self.seen)
        self.seen = []
        change = min(max(change, -self.rate), self.rate)
        self.share = min(max(self.share + change, self.lower), self.upper)
        return True

    def state_dict(self) -> dict[str, Any]:
        """The share and what was seen since it was adjusted, for a checkpoint."""
        return {"share": self.share, "seen": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; bounds that are narrower now hold."""
        self.share = min(max(float(state["share"]), self.lower), self.upper)
        self.seen = [float(value) for value in state["seen"]]

    def _wish(self, gains: float, loses: float) -> float:
        if gains == loses:
            return 0.0
        if {gains, loses} & {0.0, math.inf}:
            return math.copysign(self.rate, gains - loses)
        return self.gain * math.log(gains / loses)
