"""Which part of a model limits the learning rate, and how far the others could go."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_sharpness.report.phases import ratio_of
from megatron_sharpness.report.records import Record, Run

#: Only the last so many measurements of a part are looked at: parts change places in training.
RECENT = 20


@dataclass(frozen=True)
class PartOfRun:
    """What the last measurements say of a part.

    Attributes:
        name: of the part.
        ratio: median η/η_c along its update alone; 0 where the loss never rises along it, infinite
            where it rises from the start.
        measurements: how many tell it.
    """

    name: str
    ratio: float
    measurements: int


def ranked(run: Run) -> list[PartOfRun]:
    """Those that were measured, the one that breaks first first; without a number last."""
    found = [PartOfRun(name, *_median(records[-RECENT:])) for name, records in run.parts.items()]
    return sorted(found, key=lambda part: -part.ratio if part.measurements else math.inf)


def _median(records: list[Record]) -> tuple[float, int]:
    ratios = [ratio for record in records if (ratio := ratio_of(record)) is not None]
    return (float(np.median(ratios)), len(ratios)) if ratios else (math.nan, 0)


def format_parts(run: Run) -> str:
    """A line a part, and which of them limits the learning rate."""
    parts = ranked(run)
    first = parts[0]
    width = max(len(part.name) for part in parts)
    lines = [f"parts alone, median of their last {first.measurements} measurements:"]
    for part in parts:
        if not part.measurements:
            said = "no measurement tells"
        elif part.ratio == 0.0:
            said = "never raises the loss"
        elif part.ratio == math.inf:
            said = "raises the loss from the start"
        else:
            said = f"η/η_c {part.ratio:.3g}, breaks at {1 / part.ratio:.3g} times the learning rate"
        lines.append(f"  {part.name.ljust(width)}  {said}")
    others = [p for p in parts[1:] if p.measurements and 0.0 < p.ratio < math.inf]
    if 0.0 < first.ratio < math.inf and others:
        ahead = ", ".join(f"{p.name} {first.ratio / p.ratio:.2g}" for p in others)
        lines.append(
            f"  {first.name} breaks first; alone the others go farther by the factors {ahead}"
        )
    return "\n".join(lines)
