"""What ``megatron-sharpness verify`` says of trainings in Megatron, Bridge and FSDP2, on CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ranks
from benchmarks.results import ROOT, markdown

#: A GPT of 2 layers and width 64 with dropout.
GPT = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2
--global-batch-size 8 --train-iters 100 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine
--lr-warmup-iters 4 --weight-decay 0.1 --clip-grad 1.0 --hidden-dropout 0.1 --bf16
"""
MEGATRON = f"""
{GPT} --max-position-embeddings 64 --mock-data --tokenizer-type NullTokenizer --vocab-size 255
--split 100,0,0 --eval-interval 1000 --eval-iters 0 --attention-dropout 0.1
"""
BRIDGE = {
    "iterations": 100,
    "model": {"bf16": True, "params_dtype": "bfloat16", "pipeline_dtype": "bfloat16"},
    "precision": {"bf16": True, "params_dtype": "bfloat16"},
    "optimizer": {"use_distributed_optimizer": True},
    "ddp": {"use_distributed_optimizer": True, "overlap_grad_reduce": True,
            "overlap_param_gather": True},
}  # fmt: skip
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        trainer: ``Megatron``, ``Bridge`` or ``FSDP2``.
        processes: how many.
        flags: in addition to those of the GPT.
        script: of Megatron's training.
    """

    trainer: str
    processes: int
    flags: str = ""
    script: str = "launch/pretrain_gpt.py"

    def command(self, folder: Path) -> list[str]:
        """What starts it; nothing is to be written into the folder."""
        torchrun = ranks.torchrun(self.processes)
        if self.trainer == "Bridge":
            return [*torchrun, "-m", "tests.verify.bridge_training", str(folder),
                    json.dumps(BRIDGE)]  # fmt: skip
        if self.trainer == "FSDP2":
            script = [str(ROOT / "launch" / "fsdp" / "train.py"), "--python-docs", "prose"]
            return [*torchrun, *script, *GPT.split(), *self.flags.split()]
        script = [*ranks.MEGATRON, str(ROOT / self.script)]
        return [*torchrun, *script, *MEGATRON.split(), *self.flags.split()]


CASES = {
    "data parallel, overlapped gathers": Case("Megatron", 2, OVERLAP),
    "tensor and sequence parallel": Case(
        "Megatron", 2,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "interleaved pipeline": Case(
        "Megatron", 2,
        "--pipeline-model-parallel-size 2 --num-layers 4 "
        "--num-layers-per-virtual-pipeline-stage 1 --use-distributed-optimizer",
    ),
    "experts, with their bias": Case(
        "Megatron", 2,
        "--num-experts 4 --expert-model-parallel-size 2 --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2 "
        "--use-distributed-optimizer",
    ),
    "context parallel, precision-aware Adam": Case(
        "Megatron", 2,
        "--context-parallel-size 2 --attention-dropout 0 --use-distributed-optimizer "
        "--use-precision-aware-optimizer",
    ),
    "data parallel, overlapped gathers, in Bridge": Case("Bridge", 2),
    "launch/fsdp/train.py": Case("FSDP2", 2),
}  # fmt: skip


def verify(case: Case, out: Path, *options: str) -> dict[str, Any]:
    """What ``verify.json`` says of a training, and the exit status.

    Raises:
        RuntimeError: it could not be run.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if case.trainer == "Bridge" and (folder := os.environ.get("TRAINER_FRAMEWORKS")):
        paths += [f"{folder}/bridge", f"{folder}/hf"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    work = out.parent / "work"
    work.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sharpness.cli", "verify", "--out", str(out), *options,
         "--", *case.command(work)],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if not (out / "verify.json").exists():
        raise RuntimeError(done.stdout + done.stderr)
    document: dict[str, Any] = json.loads((out / "verify.json").read_text())
    assert document["status"] == done.returncode
    return document


def run() -> dict[str, Any]:
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            document = verify(case, Path(folder, "out"))
        print(f"{name}: {document['promises']}", file=sys.stderr, flush=True)
        comparison, cost = document["comparison"], document["cost"]
        rows = document["measurements"]
        found[name] = {
            "trainer": case.trainer,
            "processes": case.processes,
            "status": document["status"],
            "promises": document["promises"],
            "values": comparison["values"],
            "iterations": comparison["iterations"],
            "log_lines": comparison["log_lines"],
            "repeats": comparison["by_itself"] is None,
            "same": comparison["disturbed"] is None and comparison["log_differs"] is None,
            "measurements": len(rows),
            "found": sum(bool(row["losses"]) for row in rows),
            "wrong": len(document["wrong"]),
            "replay_error": max(abs(row["replayed"] - row["trained"]) for row in rows),
            "probe_passes": _short(cost["probe_seconds"] / cost["pass_seconds"]),
            "measurement_iterations": _short(
                cost["measurement_seconds"] / cost["iteration_seconds"]
            ),
        }
    return {"settings": {"gpt": GPT.split()}, "results": found}


def table(document: dict[str, Any]) -> str:
    header = (
        "trainer", "layout", "values compared after each of 12 iterations", "repeats by itself",
        "the same with measurement", "measurements confirmed", "L(θ) replayed to",
    )  # fmt: skip
    return markdown(
        header,
        (
            (
                row["trainer"],
                name,
                f"{row['values']:,} of {row['processes']} processes",
                "yes" if row["repeats"] else "no",
                "bit for bit" if row["repeats"] and row["same"] else "no",
                f"{row['found']} of {row['measurements']}" if not row["wrong"] else "no",
                f"{row['replay_error']:.1g} nat",
            )
            for name, row in document["results"].items()
        ),
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")
