"""Which of Adam's second moments could be replaced by their means, and what that would save.

By the rule of SlimAdam (Kalra et al. 2025, arXiv 2503.01843): the signal-to-noise ratios of a kind
of layer are averaged over its layers and over training, and its second moments are replaced by
their means over the dimension with the largest ratio, where that is ``CUTOFF`` or more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sharpness.core.measurement import OVER
from megatron_sharpness.report.records import Record, Run
from megatron_sharpness.report.table import aligned

CUTOFF = 1.0

#: How much memory a second moment takes in fp32.
BYTES = 4


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
        name: of its matrices, without the numbers of layers and experts.
        shapes: how many matrices there are of so many rows and columns.
        ratios: by what the means are over, the mean of SNR over layers and measurements; NaN where
            nothing varies.
    """

    name: str
    shapes: tuple[tuple[int, int, int], ...]
    ratios: dict[str, float]

    @property
    def over(self) -> str | None:
        """What the means that stand for its second moments are taken over, where there are such."""
        known = {over: r for over, r in self.ratios.items() if not math.isnan(r)}
        best = max(known, key=lambda over: known[over], default=None)
        return best if best is not None and known[best] >= CUTOFF else None

    @property
    def moments(self) -> int:
        return sum(matrices * rows * columns for matrices, rows, columns in self.shapes)

    @property
    def left(self) -> int:
        """How many numbers are left of them."""
        return sum(
            matrices * {None: rows * columns, "fan_in": rows, "fan_out": columns}.get(self.over, 1)
            for matrices, rows, columns in self.shapes
        )


def kinds_of(run: Run) -> list[Kind]:
    """Those that were measured, from all measurements."""
    seen: dict[str, list[Record]] = {}
    for record in run.records:
        for name, kind in (record.get("adam_snr") or {}).items():
            seen.setdefault(name, []).append(kind)
    return [_kind(name, records) for name, records in seen.items()]


def _kind(name: str, records: Sequence[Record]) -> Kind:
    ratios = {over: _mean([record[over] for record in records]) for over in OVER}
    return Kind(name, tuple((*shape,) for shape in records[-1]["shapes"]), ratios)


def _mean(values: list[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else math.nan


def format_moments(run: Run) -> str:
    """A line a kind, and what would be saved; empty where none were measured."""
    kinds = kinds_of(run)
    if not kinds:
        return ""
    headings = ["second moments of", "matrices", "rows", "columns", *OVER, "means over", "left"]
    rows: list[list[tuple[float | str | None, str]]] = [
        [
            (kind.name, "s"),
            *((", ".join(map(str, numbers)), "s") for numbers in zip(*kind.shapes, strict=True)),
            *((kind.ratios[over], ".3g") for over in OVER),
            (kind.over, "s"), (kind.left / kind.moments, ".2%"),
        ]
        for kind in kinds
    ]  # fmt: skip
    moments, left = sum(kind.moments for kind in kinds), sum(kind.left for kind in kinds)
    return aligned(headings, rows, to_the_left=(0,)) + (
        f"\nSNR of Adam's second moments, means of up to {_number(run)} measurements; at "
        f"{CUTOFF:g} or more their means could stand for them: {left:,} numbers in place of "
        f"{moments:,}, {1 - left / moments:.1%} less "
        f"({BYTES * (moments - left) / 2**20:,.3g} MiB in fp32)"
    )


def _number(run: Run) -> int:
    return sum(1 for record in run.records if record.get("adam_snr"))
