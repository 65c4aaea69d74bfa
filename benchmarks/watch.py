"""What the watch costs: everything that training reads later, fingerprinted twice, once a run.

Inside one real training each: the time of both looks together ÷ that of a training iteration of the
same run, and how many values and bytes of tensors a look compares on a rank.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from benchmarks import ranks
from benchmarks.probe import LAYOUTS as PROBED
from benchmarks.probe import MEGATRON
from benchmarks.results import markdown, spread

REPETITIONS = 3

#: A smaller one than the probes': what is walked is as much, and an iteration is shorter.
SMALLER = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 256 "
    "--max-position-embeddings 256 --global-batch-size 8 --train-iters 4 "
    "--measure-critical-sharpness-every 4"
)
LAYOUTS = {
    "Megatron DP2, overlap": PROBED["Megatron DP2, overlap"],
    "Megatron TP2, sequence parallel": PROBED["Megatron TP2, sequence parallel"],
    "Megatron EP2, 4 experts": (2, "--expert-model-parallel-size 2 --num-experts 4"),
    "PyTorch": (1, None),
}


def run() -> dict[str, Any]:
    results = {}
    for layout, (processes, flags) in LAYOUTS.items():
        print(f"watch: {layout}", file=sys.stderr, flush=True)
        command = (
            ["benchmarks/torch_watch.py"]
            if flags is None
            else [*ranks.MEGATRON, "benchmarks/megatron_watch.py", *MEGATRON.split(),
                  *SMALLER.split(), *flags.split()]
        )  # fmt: skip
        timed = ranks.launch(command, processes, {"BENCHMARK_REPETITIONS": str(REPETITIONS)})
        iteration = statistics.median(timed["iterations"])
        results[layout] = {
            "processes": processes,
            "price": spread(2 * look / iteration for look in timed["looks"]),
            **timed,
        }
    settings = {"repetitions": REPETITIONS, "megatron": [*MEGATRON.split(), *SMALLER.split()]}
    return {"settings": settings, "results": results}


def table(document: dict[str, Any]) -> str:
    return markdown(
        ("layout", "iteration, s", "watch ÷ iteration", "values", "tensors, MiB"),
        (
            (layout, f"{statistics.median(result['iterations']):.2f}",
             "{1:.3f} ({0:.3f}–{2:.3f})".format(*result["price"]), f"{result['values']:,}",
             f"{result['bytes'] / 2**20:.0f}")
            for layout, result in document["results"].items()
        ),
    )  # fmt: skip
