"""How many forward passes the search for the critical learning rate takes.

Trains small byte-level GPTs (see landscapes.py) and measures η_c with real forward passes, by
the paper's bisection and by the certified search without and with the slope: warm-started from
the last measurement 1, 10 or 100 steps ago, and cold from the learning rate. Prints the table
and writes it, with the machine and the versions, to results/search_evaluations.json. Takes
about ten minutes on one core:

    python benchmarks/search_evaluations.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from landscapes import Landscape, Setting, landscapes

from megatron_sharpness.search import SearchResult, find_critical_lr

# The constants of the certified search were chosen on the first group alone.
SETTINGS = {
    "tuned on": tuple(Setting(peak_lr=lr) for lr in (3e-4, 1e-3, 3e-3, 1e-2)),
    "held out": (
        Setting(peak_lr=5e-4, sequence=128, batch=8, seed=11),
        Setting(peak_lr=2e-3, width=128, layers=3, batch=8, seed=12),
        Setting(peak_lr=5e-3, weight_decay=0.0, seed=13),
        Setting(peak_lr=1.5e-3, layers=6, width=48, batch=32, seed=14),
    ),
}
METHODS = ("bisection", "certified, no slope", "certified")
CADENCES = {"every step": 1, "every 10": 10, "every 100": 100, "cold": 0}
EARLY = 20  # steps reported on their own: the loss is far from quadratic there
WINDOWS = (range(0, 50), range(100, 130), range(200, 230), range(320, 350), range(385, 400))


@dataclass(frozen=True)
class Search:
    """One search: `error` is that of the point estimate, |eta/η_c - 1|."""

    method: str
    cadence: str
    early: bool
    evaluations: int
    status: str
    error: float | None


def search(method: str, line: Landscape, guess: float) -> SearchResult:
    return find_critical_lr(
        line.loss_at,
        loss=line.loss,
        guess=guess,
        slope=line.slope if method == "certified" else None,
        method="bisection" if method == "bisection" else "certified",
    )


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
                result = search(method, line, guess if warm else line.lr)
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
                yield Search(method, cadence, early, result.evaluations, result.status, error)


def summary(searches: list[Search]) -> dict[str, object]:
    counts = sorted(search.evaluations for search in searches)
    errors = [search.error for search in searches if search.error is not None]
    return {
        "mean": round(statistics.fmean(counts), 2),
        "median": statistics.median(counts),
        "p95": counts[int(0.95 * (len(counts) - 1))],
        "max": counts[-1],
        "searches": len(counts),
        "statuses": dict(Counter(search.status for search in searches)),
        # Over a tolerance away, the bracket is that of another crossing than the first method's.
        "other_crossing": sum(error > 1 / 15 for error in errors),
        "median_error_of_eta": float(f"{statistics.median(errors):.2g}"),
    }


def tabulate(groups: dict[str, list[Search]]) -> list[dict[str, object]]:
    """One row for each group, phase, method and cadence; printed as it is made."""
    table = []
    for group, searches in groups.items():
        for early in (False, True):
            phase = f"step {'<' if early else '>='} {EARLY}"
            print(f"\n{group}, {phase}: mean/median/p95/max evaluations, error of eta")
            for method in METHODS:
                cells = []
                for cadence in CADENCES:
                    key = (method, cadence, early)
                    chosen = [s for s in searches if (s.method, s.cadence, s.early) == key]
                    if not chosen:
                        continue
                    row = summary(chosen)
                    head = {"group": group, "phase": phase, "method": method, "cadence": cadence}
                    table.append(head | row)
                    cells.append(
                        f"{cadence} {row['mean']:.2f}/{row['median']:g}/{row['p95']}/{row['max']}"
                        f" {row['median_error_of_eta']:.2%}"
                    )
                print(f"  {method:20}", *(f"{cell:32}" for cell in cells))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "results" / "search_evaluations.json"
    parser.add_argument("--output", type=Path, default=default, help="where to write the JSON")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    start = time.time()
    groups: dict[str, list[Search]] = {}
    for group, settings in SETTINGS.items():
        groups[group] = []
        for setting in settings:
            groups[group].extend(measure(setting))
            print(f"{time.time() - start:5.0f} s  {setting}", file=sys.stderr)
    table = tabulate(groups)
    output.parent.mkdir(exist_ok=True)
    document = {
        "what": "evaluations of the loss per search of the critical learning rate, bracket 1/16",
        "command": "python benchmarks/search_evaluations.py",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(time.time() - start),
        "settings": {name: [asdict(s) for s in group] for name, group in SETTINGS.items()},
        "table": table,
    }
    output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
