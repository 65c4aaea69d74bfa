"""The curves of the page, as plotly's dictionaries (https://plotly.com/javascript/reference).

Plotly itself is not imported here. Panels stand above each other with one axis of iterations; x, y
and legend of a panel carry its number.
"""

from __future__ import annotations

from html import escape
from itertools import cycle, pairwise
from typing import Any

import numpy as np

from megatron_sharpness.core.measurement import MISSED
from megatron_sharpness.report.figure import (
    BLUE,
    DOTTED_UP_TO,
    GREEN,
    GRID,
    INK,
    MUTED,
    PART_COLORS,
    RUN_COLORS,
    VERMILION,
    losses_far_apart,
)
from megatron_sharpness.report.records import Array, Record, Run, column
from megatron_sharpness.report.stages import (
    ABOVE_EDGE,
    BELOW_EDGE,
    EARLY_TRANSIENT,
    EDGE_OF_STABILITY,
    INTERMEDIATE_SATURATION,
    PROGRESSIVE_SHARPENING,
    TOO_FEW,
    Stages,
    smoothed,
)

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
STAGE_COLORS = {
    EARLY_TRANSIENT: "#BFDDF0",
    INTERMEDIATE_SATURATION: "#CFE5C9",
    PROGRESSIVE_SHARPENING: "#F8DFA5",
    EDGE_OF_STABILITY: "#F0B48C",
    ABOVE_EDGE: "#DDB4CB",
    BELOW_EDGE: "#E6E6E6",
}
_SYMBOLS = "x-thin triangle-up square diamond triangle-down cross star circle cross-thin"
MISSED_SYMBOLS = dict(zip(MISSED, _SYMBOLS.split(), strict=True))

STAGES, SHARPNESS, RATE, RATIO, PARTS, LOSS, EVALUATIONS, SECONDS = range(1, 9)
MARKS = 9  # in the panel of λ_c: a y axis from 0 at its foot to 1, and a legend below it
LOGARITHMIC = (SHARPNESS, RATE, RATIO, PARTS)
TITLES = {
    STAGES: "Stages",
    SHARPNESS: "Critical sharpness",
    RATE: "Learning rate",
    RATIO: "Learning rate over critical learning rate, η/η<sub>c</sub>",
    PARTS: "Learning rate over critical, of each part of the model alone",
    LOSS: "Loss",
    EVALUATIONS: "Forward passes a measurement",
    SECONDS: "Seconds a measurement",
}
HEIGHTS = {
    SHARPNESS: 340, RATE: 230, RATIO: 210, PARTS: 260, LOSS: 210, EVALUATIONS: 120, SECONDS: 120,
}  # fmt: skip
STAGE_HEIGHT, GAP, TOP, BOTTOM, LEGEND_ROW = 30, 60, 32, 52, 24  # pixels
IN_A_ROW = 5  # names that fit beside each other in a legend on a narrow screen

DASHED, DOTTED = "6px,3px", "1.5px,2.5px"
SHARPNESS_NAME = "λ<sub>c</sub> = 2/η<sub>c</sub>"
EDGE_NAME = "edge of stability 2/η − γ"
TWIN_NAME = "pre-conditioned edge"


def curves(runs: list[Run], stages: list[Stages], *, preconditioned: bool) -> dict[str, Any]:
    """Traces and layout of all runs, in plotly's form.

    Args:
        runs: which.
        stages: of each.
        preconditioned: whether several runs have the pre-conditioned line too, as one run has.
    """
    several = len(runs) > 1
    data = [*_stage_bars(runs, stages), _too_short(runs, stages)]
    data += [_line_at_one(runs, panel) for panel in (RATIO, PARTS) if panel in _heights(runs)]
    for number, run in enumerate(runs):
        data += _curves_of(run, number, several, preconditioned or not several)
    data += _curves_of_parts(runs)
    marks = _missed_marks(runs) + _catapult_marks(runs, stages)
    data += marks
    if several:
        data += _key(preconditioned)
    return {"data": data, "layout": _layout(runs, len(marks))}


def run_color(number: int) -> str:
    """The colour of the run ``number`` where there are several."""
    return RUN_COLORS[number % len(RUN_COLORS)]


def _heights(runs: list[Run]) -> dict[int, int]:
    """The panels from the top down and their heights; parts are drawn of one run alone."""
    heights = {STAGES: STAGE_HEIGHT * len(runs), **HEIGHTS}
    if len(runs) > 1 or not runs[0].parts:
        del heights[PARTS]
    return heights


def _layout(runs: list[Run], marks: int) -> dict[str, Any]:
    several = len(runs) > 1
    heights = _heights(runs)
    below_sharpness = LEGEND_ROW * -(-marks // IN_A_ROW)
    inner = sum(heights.values()) + GAP * (len(heights) - 1) + below_sharpness
    top = TOP + (LEGEND_ROW * -(-len(runs) // IN_A_ROW) if several else 0)  # the runs' names
    line = {"showline": True, "linecolor": MUTED, "gridcolor": GRID, "zeroline": False}
    ticks = {"ticks": "outside", "ticklen": 4, "tickcolor": MUTED, "tickfont": {"color": MUTED}}
    layout: dict[str, Any] = {
        "template": "none",
        "height": inner + top + BOTTOM,
        "margin": {"l": 64, "r": 16, "t": top, "b": BOTTOM},
        "font": {"family": FONT, "size": 13, "color": INK},
        "hoverlabel": {"bgcolor": "white", "font": {"size": 12}, "align": "left"},
        "hovermode": "closest",
        "barmode": "overlay",
        "bargap": 0.2,
        "annotations": [],
        "uniformtext": {"mode": "hide", "minsize": 11},  # a bar too short for its text has none
    }
    y_top = inner
    for panel, height in heights.items():
        domain = [(y_top - height) / inner, y_top / inner]
        y_top -= height + GAP + (below_sharpness if panel == SHARPNESS else 0)
        layout[f"xaxis{panel}"] = {**line, **ticks, "anchor": f"y{panel}"}
        if panel != SHARPNESS:
            layout[f"xaxis{panel}"]["matches"] = f"x{SHARPNESS}"
        layout[f"yaxis{panel}"] = {**line, **ticks, "anchor": f"x{panel}", "domain": domain}
        if panel in LOGARITHMIC or (panel == LOSS and several and losses_far_apart(runs)):
            layout[f"yaxis{panel}"] |= {"type": "log", "exponentformat": "power", "nticks": 6}
        layout["annotations"].append(
            {
                "text": f"<b>{TITLES[panel]}</b>",
                "font": {"size": 14},
                "showarrow": False,
                "xref": "paper",
                "x": 0,
                "xanchor": "left",
                "yref": "paper",
                "y": domain[1],
                "yanchor": "bottom",
                "yshift": 5,
            }
        )
        layout[f"legend{panel}"] = {
            "orientation": "h",
            "font": {"size": 12},
            "x": 1,
            "xanchor": "right",
            "y": domain[1],
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
            "traceorder": "normal",
        }
    layout[f"xaxis{STAGES}"] |= {"showline": False, "showgrid": False, "showticklabels": False}
    layout[f"xaxis{STAGES}"]["ticks"] = ""
    layout[f"yaxis{STAGES}"] |= {
        "type": "category",
        "categoryarray": [escape(run.name) for run in runs],
        "range": [len(runs) - 0.5, -0.5],
        "fixedrange": True,
        "automargin": True,
        "showline": False,
        "showgrid": False,
        "showticklabels": several,
        "ticks": "",
    }
    layout[f"legend{MARKS}"] = layout[f"legend{SHARPNESS}"] | {
        "y": layout[f"yaxis{SHARPNESS}"]["domain"][0] - LEGEND_ROW / inner,
        "yanchor": "top",
    }
    layout[f"yaxis{MARKS}"] = {
        "overlaying": f"y{SHARPNESS}",
        "range": [0, 1],
        "fixedrange": True,
        "visible": False,
    }
    for panel in (EVALUATIONS, SECONDS):
        layout[f"yaxis{panel}"]["rangemode"] = "tozero"
    layout[f"xaxis{SECONDS}"]["title"] = {"text": "iteration", "font": {"size": 13}}
    if several:  # the names of the runs stand above all; what they do not name is no switch
        layout[f"legend{STAGES}"] |= {
            "font": {"size": 13},
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
        }
        layout[f"legend{SHARPNESS}"] |= {"itemclick": False, "itemdoubleclick": False}
    return layout


def _axes(panel: int) -> dict[str, Any]:
    return {"xaxis": f"x{panel}", "yaxis": f"y{panel}", "legend": f"legend{panel}"}


def _curves_of(run: Run, number: int, several: bool, twins: bool) -> list[dict[str, Any]]:
    """The curves of one run: in those of the figure if it is the only one, or in its colour, with
    running medians among faint dots for λ_c and η/η_c."""
    own = run_color(number)
    blue, vermilion, green = (own, own, own) if several else (BLUE, VERMILION, GREEN)
    edge_dash, twin_dash = (DASHED, DOTTED) if several else ("solid", DASHED)
    iteration, lr, loss = run.column("iteration"), run.curve("lr"), run.curve("loss")
    points: dict[str, Any] = {
        "mode": "lines+markers",
        "marker": {"size": 5 if len(iteration) <= DOTTED_UP_TO else 3},
        "text": [_hover(run, record) for record in run.records],
        "hovertemplate": "%{text}<extra></extra>",
    }
    logged: dict[str, Any] = {
        "mode": "lines",
        "hovertemplate": f"{escape(run.name)}, iteration %{{x}}: %{{y:.4g}}<extra></extra>",
    }

    def curve(
        panel: int, x: Array, y: Array, color: str, style: dict[str, Any], name: str = ""
    ) -> dict[str, Any]:
        return {
            "type": "scatter",
            "x": x,
            "y": np.where(y > 0, y, np.nan) if panel in LOGARITHMIC else y,
            "name": name,
            "showlegend": bool(name) and not several,
            "legendgroup": f"run {number}" if several else None,
            **_axes(panel),
            **style,
            "line": {"color": color, "width": 1.6, **style.get("line", {})},
        }

    edge_style = logged | {"line": {"dash": edge_dash, "width": 1.4}}
    twin_style = logged | {"line": {"dash": twin_dash, "width": 1.4}}
    sharpness = run.column("critical_sharpness")
    edge = run.column("edge_of_stability")
    twin = run.column("edge_of_stability_preconditioned")
    ratio = run.column("lr_over_critical")
    result = [
        curve(SHARPNESS, iteration, edge, vermilion, edge_style, EDGE_NAME),
        curve(RATE, lr.iteration, lr.values, vermilion, logged, "η"),
        curve(LOSS, loss.iteration, loss.values, green, logged),
        curve(EVALUATIONS, iteration, run.column("evaluations"), blue, points),
        curve(SECONDS, iteration, run.column("seconds"), blue, points),
    ]
    if twins:
        result.append(curve(SHARPNESS, iteration, twin, vermilion, twin_style, TWIN_NAME))
    if several:
        faint = points | {"mode": "markers", "opacity": 0.35}
        level = {"mode": "lines", "hoverinfo": "skip"}
        named = {"name": escape(run.name), "showlegend": True, "legend": f"legend{STAGES}"}
        result += [
            curve(SHARPNESS, iteration, sharpness, blue, faint),
            curve(SHARPNESS, iteration, smoothed(sharpness), blue, level) | named,
            curve(RATIO, iteration, ratio, blue, faint),
            curve(RATIO, iteration, smoothed(ratio), blue, level),
        ]
    else:
        result += [
            curve(SHARPNESS, iteration, sharpness, blue, points, SHARPNESS_NAME),
            curve(RATIO, iteration, ratio, blue, points),
        ]
        rate = run.column("critical_lr")
        bracket = {
            "type": "data",
            "symmetric": False,
            "array": run.column("critical_lr_upper") - rate,
            "arrayminus": rate - run.column("critical_lr_lower"),
            "thickness": 1,
            "width": 0,
        }
        style = points | {"error_y": bracket}
        result.append(curve(RATE, iteration, rate, blue, style, "η<sub>c</sub> and its bracket"))
    return result


def _curves_of_parts(runs: list[Run]) -> list[dict[str, Any]]:
    """η/η_c of each part's update alone, and of the whole update."""
    if PARTS not in _heights(runs):
        return []
    (run,) = runs
    named = [("whole", run.records, BLUE)]
    named += [(n, r, c) for (n, r), c in zip(run.parts.items(), cycle(PART_COLORS))]
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": column(records, "iteration"),
            "y": column(records, "lr_over_critical"),
            "name": escape(name),
            "hovertemplate": f"{escape(name)}, iteration %{{x}}: %{{y:.3g}}<extra></extra>",
            "marker": {"size": 4},
            "line": {"color": color, "width": 2.2 if name == "whole" else 1.4},
            **_axes(PARTS),
        }
        for name, records, color in named
    ]


def _line_at_one(runs: list[Run], panel: int) -> dict[str, Any]:
    """η = η_c: above it the step raises the loss."""
    ends = [run.records[i]["iteration"] for run in runs for i in (0, -1)]
    return {
        "type": "scatter",
        "x": [min(ends), max(ends)],
        "y": [1, 1],
        "mode": "lines",
        "line": {"color": MUTED, "width": 1.2},
        "hoverinfo": "skip",
        "showlegend": False,
        **_axes(panel),
    }


def _key(preconditioned: bool) -> list[dict[str, Any]]:
    """What solid, dashed and dotted lines are, where colours stand for the runs."""
    kinds = [(f"{SHARPNESS_NAME}, running median", "solid"), (EDGE_NAME, DASHED)]
    kinds += [(TWIN_NAME, DOTTED)] * preconditioned
    return [
        {
            "type": "scatter",
            "x": [None],
            "y": [None],
            "mode": "lines",
            "line": {"color": MUTED, "dash": dash, "width": 1.6},
            "name": name,
            "showlegend": True,
            **_axes(SHARPNESS),
        }
        for name, dash in kinds
    ]


def _hover(run: Run, record: Record) -> str:
    """What is told of a measurement that is pointed at."""

    def number(field: str) -> str:
        value = record.get(field)
        return "–" if value is None else f"{value:.4g}"

    lines = [
        f"<b>{escape(run.name)}, iteration {record['iteration']}</b>",
        f"λ<sub>c</sub> {number('critical_sharpness')}, line {number('edge_of_stability')}",
        f"η {number('lr')}, η<sub>c</sub> {number('critical_lr')}, "
        f"η/η<sub>c</sub> {number('lr_over_critical')}",
        f"loss {number('loss')}",
        f"{record['status']}, {number('evaluations')} forward passes, {number('seconds')} s",
    ]
    if record.get("reason"):
        lines.append(escape(str(record["reason"])))
    return "<br>".join(lines)


def _missed_marks(runs: list[Run]) -> list[dict[str, Any]]:
    """A mark at the foot of the panel of λ_c for each measurement without one, by its status."""
    several = len(runs) > 1
    marks: dict[str, list[tuple[int, Run, Record]]] = {}
    for number, run in enumerate(runs):
        for record in run.records:
            if record["status"] in MISSED:
                marks.setdefault(record["status"], []).append((number, run, record))
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [record["iteration"] for _, _, record in those],
            "y": [0.035 * number for number, _, _ in those],
            "text": [_hover(run, record) for _, run, record in those],
            "hovertemplate": "%{text}<extra></extra>",
            "name": f"{status} ({len(those)})",
            "showlegend": True,
            "cliponaxis": False,
            "marker": {
                "symbol": MISSED_SYMBOLS[status] + "-open",
                "size": 9,
                "color": [run_color(number) if several else INK for number, _, _ in those],
                "line": {"width": 1.8},
            },
            **_axes(SHARPNESS),
            "yaxis": f"y{MARKS}",
            "legend": f"legend{MARKS}",
        }
        for status, those in marks.items()
    ]


def _stage_bars(runs: list[Run], stages: list[Stages]) -> list[dict[str, Any]]:
    """A row a run of bars from stage to stage; they meet halfway between two measurements."""
    bars: dict[str, list[tuple[str, float, float, str]]] = {}
    for run, its in zip(runs, stages, strict=True):
        if not its.stages:
            continue
        inner = [(one.last + other.first) / 2 for one, other in pairwise(its.stages)]
        cuts = [its.stages[0].first, *inner, its.stages[-1].last]
        for stage, (first, last) in zip(its.stages, pairwise(cuts), strict=True):
            span = f"{stage.first}–{stage.last}"
            bars.setdefault(stage.name, []).append((escape(run.name), first, last - first, span))
    return [
        {
            "type": "bar",
            "orientation": "h",
            "y": [row for row, _, _, _ in those],
            "base": [first for _, first, _, _ in those],
            "x": [length for _, _, length, _ in those],
            "text": [name] * len(those),
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "textfont": {"size": 12, "color": INK},
            "customdata": [span for _, _, _, span in those],
            "hovertemplate": f"%{{y}}: {name}, iterations %{{customdata}}<extra></extra>",
            "marker": {"color": STAGE_COLORS[name], "line": {"color": "white", "width": 1}},
            "showlegend": False,
            **_axes(STAGES),
        }
        for name, those in bars.items()
    ]


def _too_short(runs: list[Run], stages: list[Stages]) -> dict[str, Any]:
    """The rows of runs that have no stages."""
    those = [run for run, its in zip(runs, stages, strict=True) if not its.stages]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [run.records[0]["iteration"] for run in those],
        "y": [escape(run.name) for run in those],
        "text": [TOO_FEW] * len(those),
        "textposition": "middle right",
        "textfont": {"size": 12, "color": MUTED},
        "hoverinfo": "skip",
        "showlegend": False,
        **_axes(STAGES),
    }


def _catapult_marks(runs: list[Run], stages: list[Stages]) -> list[dict[str, Any]]:
    """A ring around λ_c at the peak of each catapult event."""
    x, y, text = [], [], []
    for run, its in zip(runs, stages, strict=True):
        sharpness = {each["iteration"]: each.get("critical_sharpness") for each in run.records}
        for event in its.catapults:
            x.append(event.peak)
            y.append(sharpness[event.peak])
            text.append(f"{escape(run.name)}, catapult event {escape(str(event))}")
    if not x:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": x,
            "y": y,
            "text": text,
            "hovertemplate": "%{text}<extra></extra>",
            "name": f"catapult event ({len(x)})",
            "showlegend": True,
            "marker": {"symbol": "circle-open", "size": 15, "color": INK, "line": {"width": 1.8}},
            **_axes(SHARPNESS),
            "legend": f"legend{MARKS}",
        }
    ]
