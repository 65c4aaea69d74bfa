"""The report as one HTML file: a table of the runs above their curves, to zoom and to point at.

Everything is inside the file, plotly's script too. Its content security policy forbids the browser
to load anything else, so it opens the same on a machine without a network.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

import numpy as np

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.report.curves import FONT, STAGE_COLORS, curves, run_color
from megatron_sharpness.report.figure import BLUE, GRID, INK, MUTED
from megatron_sharpness.report.parts import format_parts
from megatron_sharpness.report.records import Run
from megatron_sharpness.report.second_moments import format_moments
from megatron_sharpness.report.stages import (
    NOISE_RULE,
    RULES,
    Stages,
    stages_of,
    where_it_stands,
)
from megatron_sharpness.report.verdict import RULE as VERDICT_RULE
from megatron_sharpness.report.verdict import RULES as VERDICT_RULES
from megatron_sharpness.report.verdict import verdict_of

BUTTONS = ["zoom2d", "pan2d", "resetScale2d", "toImage"]


def write(runs: list[Run], path: Path, *, preconditioned: bool = False) -> None:
    """Write the page of ``runs`` into ``path``, several with the pre-conditioned line if asked for.

    Raises:
        InputError: ``path`` cannot be written, or plotly is missing.
    """
    try:
        from plotly.io import to_html
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise InputError(
            f"--out {path}: a .html needs plotly ({error}); pip install plotly"
        ) from error

    stages = [stages_of(run) for run in runs]
    names = escape(", ".join(run.name for run in runs)) if len(runs) < 5 else f"{len(runs)} runs"
    page = Template(_PAGE).substitute(
        title=f"Critical sharpness of {names}",
        font=FONT,
        ink=INK,
        muted=MUTED,
        grid=GRID,
        rows="\n".join(
            _row(run, its, run_color(number) if len(runs) > 1 else BLUE)
            for number, (run, its) in enumerate(zip(runs, stages, strict=True))
        ),
        notes=_notes(runs),
        moments="\n".join(
            f"<h2>Second moments of {escape(run.name)}</h2><pre>{escape(table)}</pre>"
            for run in runs
            if (table := format_moments(run))
        ),
        rules="\n".join(
            f"<dt>{_swatch(name)}{name}</dt><dd>{_html(rule)}</dd>" for name, rule in RULES.items()
        ),
        noise_rule=_html(NOISE_RULE),
        verdict_rules="\n".join(
            f"<dt>{name}</dt><dd>{_html(rule)}</dd>" for name, rule in VERDICT_RULES.items()
        ),
        verdict_rule=_html(VERDICT_RULE),
        plotly=get_plotlyjs(),
        curves=to_html(
            curves(runs, stages, preconditioned=preconditioned),
            config={"displaylogo": False, "responsive": True, "modeBarButtons": [BUTTONS]},
            include_plotlyjs=False,
            full_html=False,
            div_id="curves",
        ),
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror})") from error


def _row(run: Run, stages: Stages, color: str) -> str:
    """The row of a run in the table."""
    statuses = "<br>".join(f"{number} {status}" for status, number in run.statuses.items())
    parts = "".join(
        f"<li>{_swatch(stage.name)}{stage.name} <i>{stage.first}–{stage.last}</i></li>"
        for stage in stages.stages
    )
    events = "".join(f"<li>{_html(str(event))}</li>" for event in stages.catapults)
    cells = (
        f'<span class="run" style="background:{color}"></span>{escape(run.name)}',
        f"<b>{len(run.records)}</b><br>{statuses}",
        _verdict(run),
        f"<b>{where_it_stands(run)}</b>",
        f"<ul>{parts}</ul>" if parts else "–",
        f"<ul>{events}</ul>" if events else "none",
        f"{_median(run, 'evaluations')} forward passes<br>{_median(run, 'seconds')} s",
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _verdict(run: Run) -> str:
    verdict = verdict_of(run)
    sentences = [*verdict.sentences, *(format_parts(run).splitlines() if run.parts else [])]
    told = "".join(f"<li>{_html(sentence)}</li>" for sentence in sentences)
    return f"<details><summary><b>{verdict.name}</b></summary><ul>{told}</ul></details>"


def _html(text: str) -> str:
    """Text with the field's letters as they are printed."""
    return escape(text).replace("λ_c", "λ<sub>c</sub>").replace("η_c", "η<sub>c</sub>")


def _swatch(name: str) -> str:
    """The colour of a stage; a catapult event has none."""
    color = STAGE_COLORS.get(name)
    return f'<span class="stage" style="background:{color}"></span>' if color else ""


def _median(run: Run, field: str) -> str:
    values = run.column(field)
    values = values[np.isfinite(values)]
    return f"{np.median(values):.3g}" if len(values) else "–"


def _notes(runs: list[Run]) -> str:
    notes = []
    for field, name in (("loss", "loss"), ("lr", "learning rate")):
        if sparse := [escape(run.name) for run in runs if field not in run.logged.curves]:
            notes.append(f"The {name} of {', '.join(sparse)} is known at the measurements only.")
    return " ".join(notes)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>
body { max-width: 1500px; margin: 0 auto; padding: 28px 32px 48px; background: white;
  color: $ink; font: 14px/1.5 $font; }
h1 { margin: 0 0 4px; font-size: 22px; }
h2 { margin: 36px 0 8px; font-size: 16px; }
p { max-width: 62em; margin: 0 0 12px; color: $muted; }
table { width: 100%; margin: 20px 0 28px; border-collapse: collapse; font-size: 13px; }
th { color: $muted; font-weight: 500; text-align: left; }
th, td { padding: 7px 18px 7px 0; border-bottom: 1px solid $grid; vertical-align: top; }
td:first-child { font-weight: 600; overflow-wrap: break-word; }
pre { overflow-x: auto; font-size: 12px; }
ul { margin: 0; padding: 0; list-style: none; }
td:nth-child(2), td:nth-child(5), td:last-child { white-space: nowrap; }
i { color: $muted; font-style: normal; font-variant-numeric: tabular-nums; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 24px; max-width: 75em; }
dd { margin: 0; }
summary { cursor: pointer; }
details li { margin-top: 6px; color: $muted; }
.run { display: inline-block; width: 16px; height: 3px; margin-right: 8px; vertical-align: middle; }
.stage { display: inline-block; width: 11px; height: 11px; margin-right: 7px; border-radius: 2px; }
</style>
</head>
<body>
<h1>$title</h1>
<p>λ<sub>c</sub> = 2/η<sub>c</sub>, where η<sub>c</sub> is the smallest learning rate at which the
optimizer’s own update would raise the loss of its batch (Kalra et al. 2026, arXiv 2601.16979).
Where η/η<sub>c</sub> is above 1, the step just made has raised it.</p>
<table>
<thead><tr><th>run</th><th>measurements</th><th>verdict</th><th>λ<sub>c</sub> now</th>
<th>stages, by iteration</th>
<th>catapult events, by iteration</th><th>cost, median</th></tr></thead>
<tbody>
$rows
</tbody>
</table>
<script>$plotly</script>
$curves
<p>$notes</p>
$moments
<h2>How the verdict is found</h2>
<p>These are rules of thumb of this program, not the paper’s.</p>
<dl>
$verdict_rules
</dl>
<p>$verdict_rule</p>
<h2>How the stages are found</h2>
<p>So are these. Mini-batch training usually stays below the line.</p>
<dl>
$rules
</dl>
<p>$noise_rule</p>
</body>
</html>
"""
