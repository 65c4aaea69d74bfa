"""What the signal-to-noise ratios of Adam's second moments cost (``--measure-adam-snr``).

Inside one real training each: the time of measuring them ÷ that of a training iteration of the same
run, and ÷ that of reading the second moments once, which no way of measuring them could undercut.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from benchmarks import ranks
from benchmarks.probe import MEGATRON
from benchmarks.results import markdown, spread
from benchmarks.watch import LAYOUTS, SMALLER

REPETITIONS = 10


def run() -> dict[str, Any]:
    results = {}
    for layout, (processes, flags) in LAYOUTS.items():
        if flags is None:
            continue
        print(f"moments: {layout}", file=sys.stderr, flush=True)
        command = [
            *ranks.MEGATRON, "benchmarks/megatron_moments.py", *MEGATRON.split(),
            *SMALLER.split(), *flags.split(), "--measure-adam-snr",
        ]  # fmt: skip
        timed = ranks.launch(command, processes, {"BENCHMARK_REPETITIONS": str(REPETITIONS)})
        iteration, read = (statistics.median(timed[name]) for name in ("iterations", "reads"))
        results[layout] = {
            "processes": processes,
            "price": spread(seconds / iteration for seconds in timed["measured"]),
            "above": spread(seconds / read for seconds in timed["measured"]),
            **timed,
        }
    settings = {"repetitions": REPETITIONS, "megatron": [*MEGATRON.split(), *SMALLER.split()]}
    return {"settings": settings, "results": results}


def table(document: dict[str, Any]) -> str:
    return markdown(
        ("layout", "iteration, s", "SNR ÷ iteration", "SNR ÷ one read", "second moments"),
        (
            (layout, f"{statistics.median(result['iterations']):.2f}",
             "{1:.4f} ({0:.4f}–{2:.4f})".format(*result["price"]),
             "{1:.1f} ({0:.1f}–{2:.1f})".format(*result["above"]), f"{result['moments']:,}")
            for layout, result in document["results"].items()
        ),
    )  # fmt: skip
