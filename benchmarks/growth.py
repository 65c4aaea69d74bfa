"""How the cost of a measurement grows, and whether ``megatron-sharpness estimate`` predicts it.

Megatron on the CPU, bf16 with the distributed optimizer, in cases that differ in the size of the
model, the length of the sequences, the micro-batches of a step, or the ranks over which 16 of them
are dealt out. In each, in turns:

    forward       a forward-only pass over the step's micro-batches
    measurement   a whole one, with 3 probes, and each of its parts by itself
    predicted     the estimate of :mod:`megatron_sharpness.estimate` from that forward pass and the
                  bandwidths of a copy and of one all-gather, both measured in the same run
    slope         of log(seconds) against log(size), by least squares

The ranks share the cores of one machine: more of them than cores do not make a pass faster.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks import ranks
from benchmarks.results import ROOT, between, markdown, spread
from megatron_sharpness import estimate
from megatron_sharpness.estimate import model

REPETITIONS = 7
PASSES = 3

MEGATRON = """
--num-attention-heads 8 --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
--micro-batch-size 1 --train-iters 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 257
--split 100,0,0 --eval-iters 0 --eval-interval 1000 --lr 1e-3 --min-lr 1e-4
--lr-decay-style constant --log-interval 1 --bf16 --use-distributed-optimizer
--measure-critical-sharpness-every 1
"""


@dataclass(frozen=True)
class Case:
    """A model, and what each of so many ranks does in a step."""

    layers: int = 4
    width: int = 384
    sequence: int = 256
    micro_batches: int = 16
    processes: int = 1

    def flags(self) -> list[str]:
        """Megatron's."""
        return [
            *MEGATRON.split(),
            *("--num-layers", str(self.layers), "--hidden-size", str(self.width)),
            *("--seq-length", str(self.sequence), "--max-position-embeddings", str(self.sequence)),
            *("--global-batch-size", str(self.micro_batches * self.processes)),
        ]


#: What grows, the cases in which it does, and its size in each of them.
BASE = Case()
GROWTH: dict[str, list[Case]] = {
    "parameters": [Case(layers=2, width=256), BASE, Case(width=768)],
    "sequence": [Case(sequence=128), BASE, Case(sequence=512)],
    "micro_batches": [Case(micro_batches=4), Case(micro_batches=8), BASE],
    "processes": [Case(micro_batches=16 // n, processes=n) for n in (1, 2, 4, 8)],
}

#: Configuration → GPUs of the predictions at the defaults.
PREDICTED = {"llama_7b": 64, "llama_70b": 1024}


def run() -> dict[str, Any]:
    cases = [case for growing in GROWTH.values() for case in growing]
    timed = {case: compare(case) for case in dict.fromkeys(cases)}
    return {
        "settings": {"repetitions": REPETITIONS, "passes": PASSES, "megatron": MEGATRON.split()},
        "results": {
            "cases": list(timed.values()),
            "slopes": {
                name: slopes([timed[case] for case in growing], name)
                for name, growing in GROWTH.items()
            },
            "predictions": {name: predict(name, gpus) for name, gpus in PREDICTED.items()},
        },
    }


def compare(case: Case) -> dict[str, Any]:
    """A case as it was measured, and as it is estimated."""
    print(f"growth: {case}", file=sys.stderr, flush=True)
    timed = ranks.launch(
        [*ranks.MEGATRON, "benchmarks/growth_worker.py", *case.flags()],
        case.processes,
        {"BENCHMARK_REPETITIONS": str(REPETITIONS), "BENCHMARK_PASSES": str(PASSES)},
    )
    run = estimate.plan(estimate.parse_flags(case.flags()), case.processes)
    others = 1 - 1 / case.processes  # of what is gathered
    predicted = [
        estimate.cost(
            run,
            forward,
            memory_bandwidth=copy,
            network_bandwidth=gather * others or math.inf,
            passes=PASSES,
        )
        for forward, copy, gather in zip(
            timed["seconds"]["forward"], timed["copy"], timed["gather"], strict=True
        )
    ]
    measured = timed["seconds"]["measurement"]
    return {
        **asdict(case),
        "parameters": run.parameters,
        "ratio": spread(a.measurement / b for a, b in zip(predicted, measured, strict=True)),
        "owned": {"measured": timed["owned"], "predicted": run.owned},
        "seconds": {name: spread(values) for name, values in timed["seconds"].items()},
        "predicted": {
            name: statistics.median(getattr(cost, name) for cost in predicted)
            for name in ("probe", "write", "gather", "snapshot", "products", "restore",
                         "measurement")
        },
        "bandwidth": {name: spread(timed[name]) for name in ("copy", "gather")},
    }  # fmt: skip


def slopes(cases: Iterable[dict[str, Any]], size: str) -> dict[str, float]:
    """Exponents of the median seconds as powers of ``size``."""
    cases = list(cases)
    sizes = np.log([case[size] for case in cases])

    def slope(part: str) -> float:
        medians = [case["seconds"][part][1] for case in cases]
        return round(float(np.polyfit(sizes, np.log(medians), 1)[0]), 3)

    return {part: slope(part) for part in ("forward", "measurement", "write")}


def predict(name: str, gpus: int) -> dict[str, Any]:
    """A configuration's estimate at the defaults of the command."""
    words = (ROOT / "configs" / f"{name}.args").read_text()
    run = estimate.plan(estimate.parse_flags(estimate.split(words)), gpus)
    forward = estimate.forward_seconds(run, model.TFLOPS)
    cost = estimate.cost(
        run,
        forward,
        memory_bandwidth=model.MEMORY_BANDWIDTH * 1e9,
        network_bandwidth=model.NETWORK_BANDWIDTH * 1e9,
        passes=model.PASSES,
    )
    return {
        "gpus": gpus,
        "parameters": run.parameters,
        "forward": forward,
        "probe": cost.probe,
        "measurement": cost.measurement,
        "overhead": {
            str(every): cost.overhead(every, estimate.iteration_seconds(run, forward))
            for every in model.INTERVALS
        },
        "memory": run.memory,
    }


def table(document: dict[str, Any]) -> str:
    results = document["results"]
    cases = markdown(
        ("parameters", "sequence", "micro-batches", "ranks", "forward pass, s", "probe ÷ forward",
         "measurement, s", "predicted, s", "predicted ÷ measured", "owned: measured / predicted"),
        (
            (f"{case['parameters'] / 1e6:.1f} M", case["sequence"], case["micro_batches"],
             case["processes"], f"{case['seconds']['forward'][1]:.3f}",
             f"{case['seconds']['probe'][1] / case['seconds']['forward'][1]:.3f}",
             f"{case['seconds']['measurement'][1]:.3f}", f"{case['predicted']['measurement']:.3f}",
             between(case["ratio"]),
             f"{case['owned']['measured']:,} / {case['owned']['predicted']:,}")
            for case in results["cases"]
        ),
    )  # fmt: skip
    grows = markdown(
        ("seconds grow as a power of", "forward pass", "measurement", "write"),
        (
            (name.replace("_", "-"),
             *(f"{fit[part]:.2f}" for part in ("forward", "measurement", "write")))
            for name, fit in results["slopes"].items()
        ),
    )  # fmt: skip
    predictions = markdown(
        ("predicted", "GPUs", "forward pass, s", "probe ÷ forward", "measurement, s", "every 10",
         "every 100", "every 1000", "extra memory a GPU"),
        (
            (name, entry["gpus"], f"{entry['forward']:.2f}",
             f"{entry['probe'] / entry['forward']:.3f}", f"{entry['measurement']:.2f}",
             *(f"{share:.2%}" for share in entry["overhead"].values()),
             f"{entry['memory'] / 2**20:,.0f} MiB")
            for name, entry in results["predictions"].items()
        ),
    )  # fmt: skip
    return "\n\n".join((cases, grows, predictions))
