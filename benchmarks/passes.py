"""How many forward passes a search for the critical learning rate takes, and how far off it is.

Small byte-level GPTs (landscapes.py) are trained and η_c is searched for with real forward passes:
warm from the last measurement 1, 10 or 100 steps ago, and cold from the learning rate, by

    bisection                the paper's Algorithms 1 and 2
    certified, no slope      the certified search where the slope is not known
    certified                the certified search
    point                    an estimate from one or two passes, with a stated uncertainty
    certified after 1/8      the first pass on an eighth of the step's sequences only, counted as
    certified after 1/2      that share (or on half of them), to predict where to certify

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

from benchmarks.landscapes import Landscape, Setting, landscapes
from benchmarks.results import markdown
from megatron_sharpness.search import Probe, SearchResult, find_critical_lr, predict_critical_lr

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
#: Method → share of the step's sequences that the first pass is made on.
METHODS = {
    "bisection": 1.0,
    "certified, no slope": 1.0,
    "certified": 1.0,
    "point": 1.0,
    "certified after 1/8": 1 / 8,
    "certified after 1/2": 1 / 2,
}
CADENCES = {"every step": 1, "every 10": 10, "every 100": 100, "cold": 0}
EARLY = 20  # steps reported on their own: the loss is far from quadratic there
WINDOWS = (range(0, 50), range(100, 130), range(200, 230), range(320, 350), range(385, 400))


@dataclass(frozen=True)
class Search:
    """One search: `error` is that of η_c, |eta/η_c - 1|, and `stated` what the search said of it.

    `passes` counts a pass over a share of the batch as that share.
    """

    method: str
    cadence: str
    early: bool
    passes: float
    status: str
    error: float | None
    stated: float | None


def search(method: str, line: Landscape, guess: float) -> tuple[SearchResult, float]:
    """A search from ``guess``, and the passes that it took."""
    share = METHODS[method]
    slope = None if method in ("bisection", "certified, no slope") else line.slope
    if share < 1:
        # L over the share at θ is known from the training pass, so this is one pass over it.
        change = line.loss_at(guess, share) - line.loss_at(0.0, share)
        located = Probe(guess, line.loss + change)
        guess = predict_critical_lr(line.loss, line.slope, located) or guess
    result = find_critical_lr(
        line.loss_at,
        loss=line.loss,
        guess=guess,
        slope=slope,
        method=method if method in ("bisection", "point") else "certified",
    )
    return result, result.evaluations + (share if share < 1 else 0.0)


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
                result, passes = search(method, line, guess if warm else line.lr)
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
                yield Search(method, cadence, early, passes, result.status, error, result.error)


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
        # Over a tolerance away, the bracket is that of another crossing than the first method's.
        "other_crossing": sum(error > 1 / 15 for error in errors),
        "median_error_of_eta": float(f"{statistics.median(errors):.2g}"),
        "p95_error_of_eta": float(f"{errors[int(0.95 * (len(errors) - 1))]:.2g}"),
        "within_stated": round(sum(r <= 1 for r in stated) / len(stated), 3) if stated else None,
        "within_twice_stated": (
            round(sum(r <= 2 for r in stated) / len(stated), 3) if stated else None
        ),
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
    """Mean / 95th percentile of passes; median / largest 95th percentile of the error; and how many
    estimates are within the stated uncertainty / within twice."""
    lines: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in document["results"]:
        key = (row["group"], row["phase"], row["method"])
        lines.setdefault(key, {})[row["cadence"]] = row

    def cells(found: dict[str, dict[str, Any]]) -> Iterator[str]:
        for cadence in CADENCES:
            row = found.get(cadence)
            yield f"{row['mean']:.2f} / {row['p95']:g}" if row else "–"
        error = statistics.median(row["median_error_of_eta"] for row in found.values())
        worst = max(row["p95_error_of_eta"] for row in found.values())
        yield f"{error:.2%} / {worst:.1%}"
        yield " / ".join(f"{share:.0%}" for share in _shares(list(found.values()))) or "–"

    return markdown(
        ("runs", "phase", "search", *CADENCES, "error of η_c", "within stated / twice"),
        ((*key, *cells(found)) for key, found in lines.items()),
    )


def _shares(rows: list[dict[str, Any]]) -> list[float]:
    """Shares of all estimates that are within what was stated, and within twice that."""
    count = sum(row["statuses"].get("estimated", 0) for row in rows)
    if not count:
        return []
    return [
        sum((row[name] or 0.0) * row["statuses"].get("estimated", 0) for row in rows) / count
        for name in ("within_stated", "within_twice_stated")
    ]
