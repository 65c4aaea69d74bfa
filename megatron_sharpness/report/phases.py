"""The phases of a schedule, and how near to the critical learning rate a run was in each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_sharpness.core.measurement import rate_over_critical
from megatron_sharpness.report.records import Array, Record, Run
from megatron_sharpness.report.stages import WINDOW

WARM_UP, STABLE, DECAY = "warm-up", "stable phase", "decay"

#: The stable phase is what is measured at this share of the peak rate or more; warm-up is before
#: the first iteration of it, and decay after the last.
AT_PEAK = 0.9


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        name: ``WARM_UP``, ``STABLE`` or ``DECAY``.
        records: its measurements.
        ratios: η/η_c of those that tell it: 0 where the loss never rises along the update, infinite
            where it rises from the start.
    """

    name: str
    records: list[Record]
    ratios: Array

    @property
    def first(self) -> int:
        return int(self.records[0]["iteration"])

    @property
    def last(self) -> int:
        return int(self.records[-1]["iteration"])

    @property
    def median(self) -> float:
        """Of η/η_c; NaN where there is none."""
        return float(np.median(self.ratios)) if len(self.ratios) else math.nan

    @property
    def largest(self) -> float:
        return float(np.max(self.ratios)) if len(self.ratios) else math.nan

    @property
    def last_sharpness(self) -> float:
        """λ_c at its end, the median of the last ``WINDOW`` that were found; NaN without one."""
        found = [r["critical_sharpness"] for r in self.records if r["status"] == "found"]
        return float(np.median(found[-WINDOW:])) if found else math.nan

    @property
    def raised(self) -> int:
        """How many steps have raised the loss of their own batch."""
        return int((self.ratios > 1.0).sum())


def ratio_of(record: Record) -> float | None:
    """η/η_c of a measurement, or None where it tells none, as of a loss that is not finite."""
    if record["status"] == "non_finite":
        return None
    return rate_over_critical(record["status"], record.get("lr_over_critical"))


def phases_of(run: Run) -> list[Phase]:
    """The phases that were measured, in order; those without a measurement are left out."""
    rate = run.curve("lr")
    there = np.isfinite(rate.values) & (rate.values > 0.0)
    if not there.any():
        return []
    iteration, values = rate.iteration[there], rate.values[there]
    least = AT_PEAK * np.max(values)
    at_peak = iteration[values >= least]
    ends = (-math.inf, at_peak[0], np.nextafter(at_peak[-1], math.inf), math.inf)
    found = []
    for name, (first, end) in zip((WARM_UP, STABLE, DECAY), pairwise(ends), strict=True):
        records = [record for record in run.records if first <= record["iteration"] < end]
        if name == STABLE:  # a schedule may come back to its peak
            records = [r for r in records if r.get("lr") is None or r["lr"] >= least]
        ratios = [ratio for record in records if (ratio := ratio_of(record)) is not None]
        if records:
            found.append(Phase(name, records, np.array(ratios)))
    return found


def stable_phase(run: Run) -> Phase | None:
    """The one at the peak learning rate, where it was measured."""
    return next((phase for phase in phases_of(run) if phase.name == STABLE), None)
