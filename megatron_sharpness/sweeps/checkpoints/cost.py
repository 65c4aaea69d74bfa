"""What measuring a series of checkpoints costs, from a timed first pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sharpness.sweeps.runs import Frozen, Report


@dataclass(frozen=True)
class Cost:
    """What one checkpoint costs.

    Attributes:
        start_up: seconds of everything before the first step and after the last one.
        step: seconds of a forward and a backward pass over the global batch, and an update.
        measurement: seconds of one.
        passes: forward passes of one.
        memory: largest peak of a process, in MiB.
    """

    start_up: float
    step: float
    measurement: float
    passes: int
    memory: float

    @classmethod
    def of(cls, report: Report, records: Sequence[dict[str, Any]], steps: int) -> Cost:
        """From a run of so many steps, the last of which was measured."""
        own, *others = records
        measurement = own["seconds"] + max((record["seconds"] for record in others), default=0.0)
        return cls(
            start_up=max(report.seconds - report.working, 0.0),
            step=max(report.working - measurement, 0.0) / steps,
            measurement=measurement,
            passes=1 + own["evaluations"] + sum(1 + record["evaluations"] for record in others),
            memory=report.memory,
        )

    def text(self, label: str, count: int, frozen: Frozen) -> str:
        steps = frozen.accumulate + frozen.measure
        each = self.start_up + steps * self.step + frozen.measure * self.measurement
        return "\n".join(
            [
                f"estimate, from the first steps on {label}, which take the longest:",
                f"  checkpoints: {count}, each with {frozen.accumulate} steps for the moments and "
                f"{frozen.measure} that are measured, about {frozen.measure * self.passes} forward "
                "passes beside theirs",
                f"  start-up {self.start_up:.1f} s, a step {self.step:.3g} s, a measurement "
                f"{self.measurement:.3g} s: about {_duration(each)} a checkpoint, "
                f"{_duration(count * each)} in all",
                f"  memory: {self.memory:.0f} MiB at the peak of a process",
            ]
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
