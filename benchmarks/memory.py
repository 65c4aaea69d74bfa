"""What a measurement takes in memory, for each parameter that a rank owns.

    extra   peak bytes between the optimizer's step and the end of its measurement, above those
            before, less those of what training does anyway, a forward pass, ÷ owned parameters

Allocator statistics on a GPU; resident memory of the process on the CPU, where an offloaded copy
counts too, as host memory is all that there is.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import ranks
from benchmarks.peak import ENVIRONMENT
from benchmarks.results import markdown

MEGATRON = """
--num-layers 2 --hidden-size 1536 --num-attention-heads 8 --seq-length 16
--max-position-embeddings 16 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 1
--global-batch-size 2 --train-iters 3 --mock-data --tokenizer-type NullTokenizer --vocab-size 257
--split 100,0,0 --eval-iters 0 --eval-interval 1000 --lr 1e-3 --min-lr 1e-4
--lr-decay-style constant --log-interval 1 --measure-critical-sharpness-every 1
--critical-sharpness-on-error raise
"""
DISTRIBUTED = "--use-distributed-optimizer"
SHARDED = (
    f"{DISTRIBUTED} --use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
    "--ckpt-format fsdp_dtensor --overlap-grad-reduce --overlap-param-gather"
)
FSDP2 = "--use-torch-fsdp2 --untie-embeddings-and-output-weights --ckpt-format torch_dist"

#: Case → processes, flags of Megatron or None for PyTorch, offload, bytes promised a parameter.
CASES: dict[str, tuple[int, str | None, str, int]] = {
    "Megatron, bf16": (1, f"--bf16 {DISTRIBUTED}", "none", 4),
    "Megatron, bf16, DP2": (2, f"--bf16 {DISTRIBUTED}", "none", 4),
    "Megatron, fp32": (1, DISTRIBUTED, "none", 8),
    "Megatron-FSDP, bf16, 2 ranks": (2, f"--bf16 {SHARDED}", "none", 4),
    "FSDP2 in Megatron, bf16, 2 ranks": (2, f"--bf16 {FSDP2}", "none", 4),
    "PyTorch, fp32": (1, None, "none", 8),
    "FSDP2, 2 ranks": (2, None, "none", 8),
    "PyTorch, fp32, offload cpu": (1, None, "cpu", 8),
    "the paper's way, fp32 (PyTorch)": (1, None, "virtual", 4),
}


def run() -> dict[str, Any]:
    results = {}
    for case in CASES:
        print(f"memory: {case}", file=sys.stderr, flush=True)
        results[case] = {"extra": round(extra(case), 3), "promised": CASES[case][3]}
    return {"settings": {"megatron": MEGATRON.split()}, "results": results}


def extra(case: str) -> float:
    """Peak bytes for each owned parameter."""
    processes, flags, way, _ = CASES[case]
    script = ["benchmarks/torch_memory.py", way]
    if flags is not None:
        script = [*ranks.MEGATRON, "benchmarks/megatron_memory.py", *MEGATRON.split(),
                  *flags.split()]  # fmt: skip
    measured = ranks.launch(script, processes, ENVIRONMENT)
    return float(measured["bytes"] / measured["parameters"])


def table(document: dict[str, Any]) -> str:
    return markdown(
        ("case", "extra bytes a parameter", "promised"),
        (
            (case, f"{result['extra']:.2f}", result["promised"])
            for case, result in document["results"].items()
        ),
    )
