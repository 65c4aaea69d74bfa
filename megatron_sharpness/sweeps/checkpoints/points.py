"""What was measured at the checkpoints of a series."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sharpness.core.measurement import TRAIN, relative_sharpness
from megatron_sharpness.sweeps.checkpoints.sources import Checkpoint
from megatron_sharpness.sweeps.spread import Spread, format_endings


@dataclass(frozen=True)
class Point:
    """What was measured at a checkpoint on one kind of data.

    Attributes:
        checkpoint: which one.
        batch: ``train``, or the name of other data.
        spread: λ_c of each batch that has one.
        endings: how the measurements ended.
        reason: of the first measurement that says why it has no number.
        sha256: of the model, before and after.
        own: the first step's record where its moments and its learning rate are the checkpoint's:
            the step that the training itself made next. None otherwise.
    """

    checkpoint: Checkpoint
    batch: str
    spread: Spread
    endings: Counter[str]
    reason: str | None
    sha256: str
    own: Mapping[str, Any] | None

    @property
    def lr(self) -> float | None:
        """η of the run at the checkpoint, where it is known."""
        return self.own["lr"] if self.own else None

    @property
    def text(self) -> str:
        """Mean and standard deviation of λ_c, or how the measurements ended without a number."""
        if self.spread.finite:
            return f"{self.spread.mean:.4g} ± {self.spread.std:.2g}"
        return "∞" if self.spread.values else format_endings(self.endings)


def read_points(
    checkpoint: Checkpoint, records: Path, sha256: str, *, own_moments: bool
) -> list[Point]:
    """The points of one checkpoint's records, the step's own batch first."""
    batches: dict[str, list[dict[str, Any]]] = {}
    for line in records.read_text().splitlines():
        record = json.loads(line)
        batches.setdefault(record["batch"], []).append(record)
    points = []
    for batch, found in batches.items():
        # A loss on other data that falls by no more than its noise has nothing to fall by; that of
        # the step's own batch falls, and how far cannot be told.
        seen = [r for r in found if batch != TRAIN or r["status"] != "noise_limited"]
        values = [
            relative_sharpness(r["status"], r["critical_sharpness"], r.get("critical_lr_lower"))
            for r in seen
        ]
        points.append(
            Point(
                checkpoint,
                batch,
                spread=Spread(tuple(value for value in values if value is not None)),
                endings=Counter(record["status"] for record in found),
                reason=next((r["reason"] for r in found if r.get("reason")), None),
                sha256=sha256,
                own=found[0] if own_moments else None,
            )
        )
    return points


#: What a table has of a point's own record: column → field.
OWN = {
    "first": "critical_sharpness",
    "lr": "lr",
    "edge_of_stability": "edge_of_stability",
    "edge_of_stability_preconditioned": "edge_of_stability_preconditioned",
}


def write_table(path: Path, points: Sequence[Point]) -> None:
    """A line for each checkpoint and kind of data: mean, median and spread of λ_c over batches."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["checkpoint", "iteration", "tokens", "batch", "batches", "mean", "median", "std",
             "q16", "q84", "rises_at_once", *OWN, "endings", "sha256"]
        )  # fmt: skip
        for p in points:
            own, spread = [(p.own or {}).get(field) for field in OWN.values()], p.spread
            table.writerow(
                [p.checkpoint.label, p.checkpoint.iteration, p.checkpoint.tokens, p.batch,
                 len(spread.values), spread.mean, spread.median, spread.std, spread.quantile(0.16),
                 spread.quantile(0.84), spread.rises_at_once, *own,
                 format_endings(p.endings), p.sha256]
            )  # fmt: skip


def format_table(points: Sequence[Point]) -> str:
    """Mean and standard deviation of λ_c, a line a checkpoint and a column a kind of data."""
    batches = list(dict.fromkeys(point.batch for point in points))
    shown: dict[str, dict[str, str]] = {}
    for point in points:
        shown.setdefault(point.checkpoint.label, {})[point.batch] = point.text
    width = max(map(len, shown)) + 2
    lines = ["λ_c".ljust(width) + "".join(f"{batch:>22}" for batch in batches)]
    for label, texts in shown.items():
        lines.append(label.ljust(width) + "".join(f"{texts.get(b, ''):>22}" for b in batches))
    return "\n".join(lines)
