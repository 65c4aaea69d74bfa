"""How many forward passes a search for the critical learning rate takes, and how far off it is.

Small byte-level GPTs (landscapes.py) are trained and η_c is searched for with real forward passes:
warm from the last measurement 1, 10 or 100 steps ago, and cold from the learning rate, by

    bisection                the paper's Algorithms 1 and 2, to a bracket of 1/16
    certified, no slope      the certified search where the slope is not known, to 1/4
    certified                the certified search, to 1/4

The constants of the search were chosen on the runs "tuned on"; nothing was chosen on "held out".
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.landscapes import Setting, landscapes
from benchmarks.results import markdown
from megatron_sharpness.core.checks import ROUNDING
from megatron_sharpness.core.search import find_critical_lr

SETTINGS = {
    "tuned on": tuple(Setting(peak_lr=lr) for lr in (3e-4, 1e-3, 3e-3, 1e-2)),
    "held out": (
        Setting(peak_lr=5e-4, sequence=128, batch=8, seed=11),
        Setting(peak_lr=2e-3, width=128, layers=3, batch=8, seed=12),
        Setting(peak_lr=5e-3, weight_decay=0.0, seed=13),
        Setting(peak_lr=1.5e-3, layers=6, width=48, batch=32, seed=14),
    ),
    "large batch": tuple(
        Setting(peak_lr=lr, batch=128, steps=200, decay=50, seed=seed)
        for lr, seed in ((2e-3, 15), (5e-4, 16), (5e-3, 17))
    ),
}
METHODS = ("bisection", "certified, no slope", "certified")
CADENCES = {"every step": 1, "every 10": 10, "every 100": 100, "cold": 0}
EARLY = 20  # steps reported on their own: the loss is far from quadratic there
WINDOWS = (range(0, 50), range(100, 130), range(200, 230), range(320, 350), range(385, 400))


@dataclass(frozen=True)
class Search:
    """One search: `error` is |eta/η_c - 1|, and `stated` what the search said of it."""

    method: str
    cadence: str
    early: bool
    passes: int
    status: str
    error: float | None
    stated: float | None


def due(step: int) -> list[tuple[str, int]]:
    """(cadence, series) that measure at a step; every 100 steps runs ten series side by side."""
    windowed = [("every step", 0)] if any(step in window for window in WINDOWS) else []
    regular = [("every 10", 0), ("every 100", step % 100), ("cold", 0)] if step % 10 == 0 else []
    return windowed + regular


def measure(setting: Setting) -> Iterator[Search]:
    """All searches of one run; the first of a warm series has no last η_c and is left out."""
    last: dict[tuple[str, str, int], tuple[int, float]] = {}
    for line in landscapes(setting):
        early = line.step < EARLY
        exact: float | None = None
        for cadence, series in due(line.step):
            gap = CADENCES[cadence]
            for method in METHODS:
                step, guess = last.get((method, cadence, series), (-1, line.lr))
                warm = step >= 0 and line.step - step == gap and (step < EARLY) == early
                result = find_critical_lr(
                    line.loss_at,
                    loss=line.loss,
                    guess=guess if warm else line.lr,
                    slope=line.slope if method == "certified" else None,
                    # As the meter counts it for losses computed in fp32.
                    noise=ROUNDING * line.loss,
                    method="bisection" if method == "bisection" else "certified",
                )
                if result.eta is not None and gap:
                    last[method, cadence, series] = line.step, result.eta
                if gap and not warm:
                    continue
                if exact is None and result.eta is not None:
                    exact = find_critical_lr(
                        line.loss_at,
                        loss=line.loss,
                        guess=result.eta,
                        slope=line.slope,
                        tolerance=2.0**-12,
                    ).eta
                error = abs(result.eta / exact - 1) if result.eta and exact else None
                yield Search(
                    method, cadence, early, result.evaluations, result.status, error, result.error
                )


def summary(searches: list[Search]) -> dict[str, Any]:
    passes = sorted(search.passes for search in searches)
    errors = sorted(search.error for search in searches if search.error is not None)
    stated = [
        search.error / search.stated
        for search in searches
        if search.error is not None and search.stated
    ]
    return {
        "mean": round(statistics.fmean(passes), 2),
        "median": statistics.median(passes),
        "p95": passes[int(0.95 * (len(passes) - 1))],
        "max": passes[-1],
        "searches": len(passes),
        "statuses": dict(Counter(search.status for search in searches)),
        # The bracket is that of another crossing than the first method's.
        "other_crossing": sum(error > 1 / 3 for error in errors),
        "median_error_of_eta": float(f"{statistics.median(errors):.2g}"),
        "p95_error_of_eta": float(f"{errors[int(0.95 * (len(errors) - 1))]:.2g}"),
        "median_stated": float(f"{statistics.median(s.stated for s in searches if s.stated):.2g}"),
        "within_stated": round(sum(r <= 1 for r in stated) / len(stated), 3),
        "within_twice_stated": round(sum(r <= 2 for r in stated) / len(stated), 3),
    }


def run() -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = []
    for group, settings in SETTINGS.items():
        searches: list[Search] = []
        for setting in settings:
            print(f"passes: {setting}", file=sys.stderr, flush=True)
            searches.extend(measure(setting))
        for early in (False, True):
            phase = f"step {'<' if early else '>='} {EARLY}"
            for method in METHODS:
                for cadence in CADENCES:
                    key = (method, cadence, early)
                    chosen = [s for s in searches if (s.method, s.cadence, s.early) == key]
                    if chosen:
                        head = {"group": group, "phase": phase, "method": method}
                        rows.append(head | {"cadence": cadence} | summary(chosen))
    return {
        "settings": {name: [asdict(s) for s in group] for name, group in SETTINGS.items()},
        "results": rows,
    }


def table(document: dict[str, Any]) -> str:
    """Mean / 95th percentile of passes, and the most; median / largest 95th percentile of the
    error; the median of what is stated, and how many are within it / within twice."""
    lines: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in document["results"]:
        key = (row["group"], row["phase"], row["method"])
        lines.setdefault(key, {})[row["cadence"]] = row

    def cells(found: dict[str, dict[str, Any]]) -> Iterator[str]:
        for cadence in CADENCES:
            row = found.get(cadence)
            yield f"{row['mean']:.2f} / {row['p95']:g}" if row else "–"
        yield str(max(row["max"] for row in found.values()))
        error = statistics.median(row["median_error_of_eta"] for row in found.values())
        worst = max(row["p95_error_of_eta"] for row in found.values())
        yield f"{error:.2%} / {worst:.1%}"
        yield f"{statistics.median(row['median_stated'] for row in found.values()):.2%}"
        count = sum(row["searches"] for row in found.values())
        yield " / ".join(
            f"{sum(row[name] * row['searches'] for row in found.values()) / count:.0%}"
            for name in ("within_stated", "within_twice_stated")
        )

    return markdown(
        ("runs", "phase", "search", *CADENCES, "most", "error of η_c", "stated",
         "within stated / twice"),
        ((*key, *cells(found)) for key, found in lines.items()),
    )  # fmt: skip
