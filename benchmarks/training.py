"""What measuring every 10, 100 or 1000 iterations adds to the time of a training.

Megatron trains a GPT on the Python documentation in one process, in turns without and with
measurements, and every second pair the other way round, from the same seed. The model is just large
enough for its time to go into matrix products, as on a GPU, and not into Python:

    pair      wall time of the iterations with measurements ÷ without, of each pair of runs
    inside    time spent in measurements ÷ the rest of the same run, which other load on the machine
              moves less
    steady    the same, as if the first measurement, which tests itself with three passes more, had
              taken what the median one does; not where there was only one
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import ranks
from benchmarks.results import between, markdown, spread
from megatron_sharpness import cli

#: Interval → iterations of a run, pairs of runs.
CADENCES = {10: (200, 4), 100: (1000, 4), 1000: (1100, 2)}
SKIPPED = 5  # iterations at the start of a run that are not timed

MEGATRON = """
--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 256
--max-position-embeddings 256 --position-embedding-type rope --attention-dropout 0
--hidden-dropout 0 --micro-batch-size 4 --global-batch-size 8 --tokenizer-type NullTokenizer
--vocab-size 257 --split 100,0,0 --eval-iters 0 --eval-interval 10000 --lr 1e-3 --min-lr 1e-4
--lr-decay-style constant --lr-warmup-iters 50 --adam-beta2 0.95 --log-interval 1 --bf16
"""


def run() -> dict[str, Any]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "python")
        cli.main(["tokenize", str(data), "--python-docs", "prose"])
        for every, (iterations, pairs) in CADENCES.items():
            timed = []
            for pair in range(pairs):
                print(f"training: every {every}, pair {pair + 1}", file=sys.stderr, flush=True)
                order = (0, every) if pair % 2 == 0 else (every, 0)
                ran = {n: train(data, iterations, n) for n in order}
                timed.append((ran[0], ran[every]))
            results[str(every)] = {
                "iterations": iterations,
                "pair": spread(on["seconds"] / off["seconds"] for off, on in timed),
                "inside": spread(on["inside"] for _, on in timed),
                "steady": spread(on["steady"] for _, on in timed),
                "evaluations": [on["evaluations"] for _, on in timed],
                "iteration": spread(off["seconds"] / iterations for off, _ in timed),
            }
    return {"settings": {"megatron": MEGATRON.split()}, "results": results}


def train(data: Path, iterations: int, every: int) -> dict[str, Any]:
    flags = [
        *MEGATRON.split(), "--train-iters", str(iterations), "--data-path", str(data),
        "--data-cache-path", str(data.parent / "cache"),
        "--measure-critical-sharpness-every", str(every),
    ]  # fmt: skip
    timed = ranks.launch([*ranks.MEGATRON, "benchmarks/megatron_training.py", *flags])
    seconds = timed["over"][-1] - timed["over"][SKIPPED - 1]
    spent = [took for took, _ in timed["measured"]]
    rest = seconds - sum(spent)
    first = spent[0] - statistics.median(spent) if spent else 0.0
    return {
        "seconds": seconds,
        "inside": sum(spent) / rest,
        "steady": (sum(spent) - first) / rest,
        "evaluations": [count for _, count in timed["measured"]],
    }


def table(document: dict[str, Any]) -> str:
    return markdown(
        ("every", "iterations", "passes, mean", "run with ÷ without", "inside the run", "steady"),
        (
            (
                every,
                result["iterations"],
                f"{statistics.fmean(itertools.chain(*result['evaluations'])):.1f}",
                between(result["pair"], ".3f"),
                between(result["inside"], ".2%"),
                between(result["steady"], ".2%") if len(result["evaluations"][0]) > 1 else "–",
            )
            for every, result in document["results"].items()
        ),
    )
