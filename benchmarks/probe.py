"""What one probe costs: write θ(η), gather it, run the forward pass, reduce the loss.

Inside one real training step each, in turns on the same micro-batches, with models whose forward
pass takes at least 200 ms:

    price   a probe ÷ a plain forward-only pass of the same framework
    limit   the forward pass plus the bytes of the write (θ_t and θ_{t+1} read, the model written)
            at the bandwidth of a copy and those of the gather at the bandwidth of one all-gather,
            both measured in the same run, ÷ the forward pass

FSDP gathers in every forward pass, a plain one too; so its limit has no gather.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from benchmarks import ranks
from benchmarks.memory import DISTRIBUTED, FSDP2, SHARDED
from benchmarks.results import between, markdown, spread

REPETITIONS = 15

MEGATRON = """
--num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 512
--max-position-embeddings 512 --position-embedding-type rope --attention-dropout 0
--hidden-dropout 0 --micro-batch-size 2 --global-batch-size 16 --train-iters 3
--mock-data --tokenizer-type NullTokenizer --vocab-size 257 --split 100,0,0 --eval-iters 0
--eval-interval 1000 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant --log-interval 1 --bf16
--measure-critical-sharpness-every 3
"""
LAYOUTS = {
    "Megatron DP2": (2, DISTRIBUTED),
    "Megatron DP2, overlap": (2, f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"),
    "Megatron TP2, sequence parallel": (2, f"{DISTRIBUTED} --tensor-model-parallel-size 2 "
                                           "--sequence-parallel"),
    "Megatron PP2": (2, f"{DISTRIBUTED} --pipeline-model-parallel-size 2"),
    "Megatron TP2 × PP2": (4, f"{DISTRIBUTED} --tensor-model-parallel-size 2 "
                              "--pipeline-model-parallel-size 2 --sequence-parallel"),
    "Megatron-FSDP": (2, SHARDED),
    "FSDP2 in Megatron": (2, FSDP2),
    "FSDP2": (2, None),
}  # fmt: skip


def run() -> dict[str, Any]:
    results = {}
    for layout, (processes, flags) in LAYOUTS.items():
        print(f"probe: {layout}", file=sys.stderr, flush=True)
        command = (
            ["benchmarks/fsdp_probe.py"]
            if flags is None
            else [*ranks.MEGATRON, "benchmarks/megatron_probe.py", *MEGATRON.split(),
                  *flags.split()]
        )  # fmt: skip
        timed = ranks.launch(command, processes, {"BENCHMARK_REPETITIONS": str(REPETITIONS)})
        seconds = timed["seconds"]
        plain = statistics.median(seconds["plain"])
        write = timed["written"] / timed["copy"]
        gather = timed["gathered"] / timed["gather"] if timed["gathered"] else 0.0
        results[layout] = {
            "processes": processes,
            "price": spread(a / b for a, b in zip(seconds["probe"], seconds["plain"], strict=True)),
            "limit": round((plain + write + gather) / plain, 4),
            "parts": {
                name: spread(value / plain for value in values)
                for name, values in seconds.items()
                if name not in ("plain", "probe")
            },
            "limits": {"write": round(write / plain, 4), "gather": round(gather / plain, 4)},
            **timed,
        }
    return {
        "settings": {"repetitions": REPETITIONS, "megatron": MEGATRON.split()},
        "results": results,
    }


def table(document: dict[str, Any]) -> str:
    def share(result: dict[str, Any], part: str) -> str:
        if part not in result["parts"]:
            return "–"
        limit = result["limits"].get(part)
        return f"{result['parts'][part][1]:.1%}" + (f" / {limit:.1%}" if limit is not None else "")

    return markdown(
        ("layout", "plain pass, s", "price of a probe", "limit", "write / its limit",
         "gather / its limit", "random states", "reduction"),
        (
            (layout, f"{statistics.median(result['seconds']['plain']):.2f}",
             between(result["price"], ".3f"), f"{result['limit']:.3f}",
             *(share(result, part) for part in ("write", "gather", "states", "reduce")))
            for layout, result in document["results"].items()
        ),
    )  # fmt: skip
