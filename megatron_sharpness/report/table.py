"""Measurements and runs as aligned text, and how a run stands in a line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_sharpness.report.phases import stable_phase
from megatron_sharpness.report.records import Record, Run
from megatron_sharpness.report.stages import where_it_stands
from megatron_sharpness.report.verdict import last_loss, verdict_of

_COLUMNS = (  # heading, field, format
    ("iteration", "iteration", "d"),
    ("loss", "loss", ".4f"),
    ("lr", "lr", ".3g"),
    ("η_c", "critical_lr", ".3g"),
    ("lr/η_c", "lr_over_critical", ".3f"),
    ("λ_c", "critical_sharpness", ".4g"),
    ("2/lr − γ", "edge_of_stability", ".4g"),
    ("λ_dir", "directional_sharpness", ".4g"),
    ("evaluations", "evaluations", "d"),
    ("seconds", "seconds", ".2f"),
    ("status", "status", "s"),
)


def format_table(records: list[Record]) -> str:
    """One line a record below a heading; ``-`` where a record holds no number."""
    return aligned(
        [heading for heading, _, _ in _COLUMNS],
        ([(record.get(field), spec) for _, field, spec in _COLUMNS] for record in records),
    )


def format_runs(runs: Iterable[Run]) -> str:
    """One line a run by its peak learning rate, the lowest first: median and largest η/η_c in the
    stable phase, λ_c at the end of it, the loss in the end, and the verdict."""
    rows = []
    for peak, run in sorted(((_peak(run), run) for run in runs), key=lambda pair: pair[0]):
        numbers = [peak, math.nan, math.nan, math.nan]
        if (stable := stable_phase(run)) is not None:
            numbers[1:] = stable.median, stable.largest, stable.last_sharpness
        row: list[tuple[float | str | None, str]] = [(run.name, "s")]
        row += [(number, ".3g") for number in numbers]
        rows.append([*row, (last_loss(run), ".4f"), (verdict_of(run).name, "s")])
    headings = ["run", "peak lr", "median lr/η_c", "largest", "λ_c", "loss", "verdict"]
    return aligned(headings, rows, to_the_left=(0, 6))


def _peak(run: Run) -> float:
    """The largest learning rate."""
    rates = run.curve("lr").values
    return float(np.max(rates[np.isfinite(rates)], initial=0.0))


def aligned(
    headings: Sequence[str],
    rows: Iterable[Sequence[tuple[float | str | None, str]]],
    to_the_left: Sequence[int] = (),
) -> str:
    """Values with their formats below headings, a line a row; ``-`` for None and NaN."""
    cells = [list(headings)]
    cells += [[_cell(value, spec) for value, spec in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number in to_the_left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _cell(value: float | str | None, spec: str) -> str:
    return "-" if value is None or value != value else format(value, spec)


def format_status(run: Run) -> str:
    """How the measurements of the run ended, counted, and the stage that it is in."""
    statuses = ", ".join(f"{number} {status}" for status, number in run.statuses.items())
    return f"{len(run.records)} measurements ({statuses}); now: {where_it_stands(run)}"
