"""Measurements as aligned text, and how a run stands in a line."""

from __future__ import annotations

from megatron_sharpness.report.records import Record, Run
from megatron_sharpness.report.stages import where_it_stands

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
    rows = [[heading for heading, _, _ in _COLUMNS]]
    for record in records:
        values = [(record.get(field), spec) for _, field, spec in _COLUMNS]
        rows.append(["-" if value is None else format(value, spec) for value, spec in values])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def format_status(run: Run) -> str:
    """How the measurements of the run ended, counted, and the stage that it is in."""
    statuses = ", ".join(f"{number} {status}" for status, number in run.statuses.items())
    return f"{len(run.records)} measurements ({statuses}); now: {where_it_stands(run)}"
