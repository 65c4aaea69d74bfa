"""The learning rate has come too close to the critical one: said in time, and looked at closer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_sharpness.core.measurement import Measurement, rate_over_critical


@dataclass(frozen=True)
class Alarm:
    """An alarm that goes on, or is over.

    Attributes:
        iteration: of the measurement that decided it.
        threshold: of η/η_c.
        ratios: η/η_c of the measurements in a row that are all above it, or all not; infinite where
            the update raises the loss from the start, or the loss is not finite.
        on: whether it goes on.
    """

    iteration: int
    threshold: float
    ratios: tuple[float, ...]
    on: bool

    def __str__(self) -> str:
        """In a line, for the log."""
        seen = ", ".join(f"{ratio:.3g}" for ratio in self.ratios)
        if not self.on:
            return (
                f"critical sharpness: the alarm is over at iteration {self.iteration}: "
                f"learning rate over critical is no longer above {self.threshold:g} ({seen})"
            )
        return (
            f"critical sharpness: ALARM at iteration {self.iteration}: learning rate over critical "
            f"is above {self.threshold:g} ({seen}). Above 1 a step raises the loss of its own "
            "batch; lower the learning rate, or warm up longer, if this goes on"
        )


@dataclass
class AlarmBell:
    """Rings while η/η_c is above a threshold.

    It begins with ``after`` measurements in a row above, and ends with as many in a row that are
    not. One that tells neither, such as a skipped step, counts for nothing.

    Args:
        threshold: of η/η_c; None never rings.
        after: how many measurements in a row.
    """

    threshold: float | None
    after: int
    rings: bool = field(default=False, init=False)
    ratios: list[float] = field(default_factory=list, init=False)

    def observe(self, record: Measurement) -> Alarm | None:
        """Take in a record of the step's own batch; what it begins or ends."""
        ratio = rate_over_critical(record.status, record.lr_over_critical)
        if self.threshold is None or ratio is None:
            return None
        if (ratio > self.threshold) == self.rings:
            self.ratios = []
            return None
        self.ratios.append(ratio)
        if len(self.ratios) < self.after:
            return None
        self.rings = not self.rings
        alarm = Alarm(record.iteration, self.threshold, tuple(self.ratios), self.rings)
        self.ratios = []
        return alarm

    def state_dict(self) -> list[float]:
        """As plain numbers, for a checkpoint: whether it rings, and what has been seen in a row."""
        return [float(self.rings), *self.ratios]

    def load_state_dict(self, state: Sequence[float]) -> None:
        """Go on from :meth:`state_dict`, or from nothing."""
        self.rings = bool(state and state[0])
        self.ratios = list(state[1:])
