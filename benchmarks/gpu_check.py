"""Everything that this repository wants to know from a machine with GPUs, in a few minutes.

``./launch/gpu_check.sh`` runs it. Each part has a limit of its own, and one that fails or comes to
its limit does not keep the others from running. Where there is no GPU the same parts run on the CPU
at a small size.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import ranks
from benchmarks.results import ROOT, machine, markdown
from megatron_sharpness import cli
from megatron_sharpness.megatron.cpu import REQUIRED_FLAGS
from megatron_sharpness.processes import run_command
from megatron_sharpness.report.records import read_records

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
WITH_ENGINE = importlib.util.find_spec("transformer_engine") is not None

#: What makes kernels repeat.
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}  # fmt: skip

#: The paper's GPT, 12 layers of width 768 (section 3), or a small one.
LAYERS, WIDTH, SEQUENCE = (12, 768, 1024) if GPUS else (2, 64, 64)
MICRO_BATCH = 8 if GPUS else 2
MODEL = (
    f"--num-layers {LAYERS} --hidden-size {WIDTH} --num-attention-heads {max(2, WIDTH // 64)} "
    f"--seq-length {SEQUENCE} --attention-dropout 0 --hidden-dropout 0 --micro-batch-size "
    f"{MICRO_BATCH} --lr 1e-3 --min-lr 1e-4 --lr-decay-style WSD --lr-wsd-decay-style linear "
    "--adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --bf16"
)


#: pytest's exit status where no test is left.
NOTHING_TO_TEST = 5


class OutOfTime(Exception):
    """A part has come to its limit."""


@dataclass
class Part:
    """One part of the check.

    Attributes:
        name: in the table.
        share: of the time of all parts.
        command: what it starts, with a folder of its own.
        read: what it has come to, from that folder and its log.
        missing: why it is left out, if so.
        ends_at_limit: whether it goes on for as long as it may.
    """

    name: str
    share: float
    command: Callable[[Path], list[str]]
    read: Callable[[Path, str], dict[str, Any]]
    missing: str | None = None
    ends_at_limit: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    def run(self, folder: Path, seconds: float) -> None:
        """Run it for so long at most, with what makes kernels repeat."""
        if self.missing is not None:
            self.found = {"status": "left out", "reason": self.missing}
            return
        folder.mkdir(parents=True)
        log, began = folder / "log.txt", time.monotonic()

        def progress() -> str:
            if time.monotonic() - began > seconds:
                raise OutOfTime
            return f"{self.name}: {time.monotonic() - began:.0f} of {seconds:.0f} s"

        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                       "OMP_NUM_THREADS": "1", **DETERMINISTIC}  # fmt: skip
        code: int | None = None
        with contextlib.suppress(OutOfTime):
            code = run_command(self.command(folder), log, progress, environment)
        try:
            self.found = self.read(folder, log.read_text(errors="replace"))
        except (OSError, ValueError, LookupError) as error:
            self.found = {"reason": f"{type(error).__name__}: {error}"}
        goes_on = self.ends_at_limit and code is None and bool(self.found.get("measurements"))
        status = f"failed ({code})"
        if goes_on or code == 0:
            status = "passed"
        elif code is None:
            status = "out of time"
        elif code == NOTHING_TO_TEST and self.read is read_tests:
            status = "skipped"
        self.found = {
            "status": status, "seconds": round(time.monotonic() - began, 1), **self.found
        }  # fmt: skip


def megatron(processes: int, *flags: str) -> list[str]:
    """A training of the GPT in Megatron, with Transformer Engine and flash attention if there."""
    engine = ("--transformer-impl", "transformer_engine", "--attention-backend", "flash")
    plain = [part for flag in REQUIRED_FLAGS if flag[0] != "--distributed-backend" for part in flag]
    given = f"""
        {MODEL} --max-position-embeddings {SEQUENCE} --mock-data --tokenizer-type NullTokenizer
        --vocab-size 50257 --split 100,0,0 --eval-interval 1000 --eval-iters 0 --train-iters 1000
        --global-batch-size {2 * MICRO_BATCH * processes} --lr-wsd-decay-iters 100
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --deterministic-mode
    """
    return [
        *ranks.torchrun(processes), *ranks.MEGATRON, "launch/pretrain_gpt.py",
        *given.split(), *(engine if GPUS and WITH_ENGINE else plain), *flags,
    ]  # fmt: skip


def verified(*command: str) -> Callable[[Path], list[str]]:
    """``megatron-sharpness verify`` of a training command."""
    return lambda folder: [
        sys.executable, "-m", "megatron_sharpness.cli", "verify", "--out", str(folder / "verify"),
        "--iterations", "8", "--every", "4", "--", *command,
    ]  # fmt: skip


def read_tests(folder: Path, log: str) -> dict[str, Any]:
    return {"said": re.findall(r"\d+ (?:passed|failed|skipped|error).* in [\d.]+s.*", log)[-1]}


def read_verification(folder: Path, log: str) -> dict[str, Any]:
    """What ``verify.json`` says."""
    document = json.loads((folder / "verify" / "verify.json").read_text())
    cost = document["cost"]
    said = "; ".join(f"{promise}: {found}" for promise, found in document["promises"].items())
    if cost["probe_seconds"] and cost["pass_seconds"]:
        said += f"; a probe takes {cost['probe_seconds'] / cost['pass_seconds']:.2f} passes"
    if (memory := cost["device_memory"]) is not None:
        off, on = memory["off"] / 2**30, memory["on"] / 2**30
        said += f"; peak memory {off:.2f} GiB without measurement, {on:.2f} with it"
    kept = {key: document[key] for key in ("promises", "cost", "facts", "wrong")}
    return {"said": said, **kept}


def read_training(folder: Path, log: str) -> dict[str, Any]:
    """How far the GPT got; its curve is drawn where matplotlib is there."""
    run = folder / "tensorboard"
    records = read_records(run / "critical_sharpness.jsonl")
    found = [record for record in records if record["status"] == "found"]
    milliseconds = [float(ms) for ms in re.findall(r"per iteration \(ms\): ([\d.]+)", log)]
    if importlib.util.find_spec("matplotlib") is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main(["report", str(run), "--out", str(folder / "curves.png")])
    rates = [record["lr_over_critical"] for record in found]
    middle = statistics.median(rates) if rates else math.nan
    return {
        "said": f"{records[-1]['iteration']} iterations, {len(found)} of {len(records)} "
        f"measurements found, η/η_c {middle:.3g} in the median",
        "iterations": records[-1]["iteration"],
        "measurements": len(records),
        "milliseconds": statistics.median(milliseconds) if milliseconds else None,
        "seconds_of_a_measurement": statistics.median(record["seconds"] for record in records),
        "curve": [
            {key: record[key] for key in ("iteration", "lr", "loss", "critical_sharpness")}
            for record in records
        ],
    }


def train(folder: Path) -> list[str]:
    """The GPT under FSDP2, for as long as there is time."""
    iterations, every, accumulated = (4000, 20, 8) if GPUS else (40, 10, 2)
    given = f"""
        {MODEL} --python-docs prose code --train-iters {iterations} --lr-warmup-iters
        {iterations // 20} --lr-wsd-decay-iters {iterations // 5} --global-batch-size
        {accumulated * MICRO_BATCH * max(1, GPUS)} --log-interval 10
        --measure-critical-sharpness-every {every} --tensorboard-dir {folder / "tensorboard"}
    """
    flash = ["--attention-backend", "flash"] if GPUS else []
    return [*ranks.torchrun(max(1, GPUS)), "launch/fsdp/train.py", *given.split(), *flash]


def compiled(folder: Path) -> list[str]:
    """A loop of one's own under FSDP2 with ``torch.compile``."""
    sizes = (LAYERS, WIDTH, SEQUENCE, 9)
    return [
        *ranks.torchrun(max(1, GPUS)), "-m", "benchmarks.gpu_check_loop", str(folder / "verify"),
        *map(str, sizes),
    ]  # fmt: skip


def parts() -> list[Part]:
    """All of them; the last one takes what time is left."""
    no_megatron = None
    if importlib.util.find_spec("megatron") is None:
        no_megatron = "megatron-core is not installed"
    no_engine = no_megatron
    if no_engine is None and not (GPUS and WITH_ENGINE):
        no_engine = "it needs a GPU and Transformer Engine"
    several = no_megatron or (None if GPUS > 1 else "there are not several GPUs")
    fp8 = ("--fp8-format", "hybrid", "--fp8-recipe", "delayed")
    graphs = ("--cuda-graph-impl", "local")
    tests = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    return [
        Part("tests/gpu", 0.25, lambda folder: tests, read_tests),
        Part("verify: Megatron", 0.25, verified(*megatron(1)), read_verification, no_megatron),
        Part("verify: Megatron on all GPUs", 0.2, verified(*megatron(max(1, GPUS))),
             read_verification, several),
        Part("verify: Megatron, fp8", 0.2, verified(*megatron(1, *fp8)), read_verification,
             no_engine),
        Part("verify: Megatron, CUDA graphs", 0.2, verified(*megatron(1, *graphs)),
             read_verification, no_engine),
        Part("verify: FSDP2 with torch.compile", 0.2, compiled, read_verification),
        Part("the paper's GPT", 1.0, train, read_training, ends_at_limit=True),
    ]  # fmt: skip


def table(document: dict[str, Any]) -> str:
    rows = (
        (name, found["status"], found.get("seconds", "–"),
         found.get("said") or found.get("reason", "–"))
        for name, found in document["parts"].items()
    )  # fmt: skip
    return markdown(("part", "status", "seconds", "found"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder, that is not there yet")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all (default: 8)")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"--out {given.out}: it is there; give a folder that is not")
    given.out.mkdir(parents=True)
    out, end = given.out.resolve(), time.monotonic() + 60 * given.minutes
    if not GPUS:
        print("no GPU is seen: the same parts run on the CPU, at a small size", flush=True)
    document = {**machine(), "gpus": GPUS, "minutes": given.minutes, "parts": {}}
    for number, part in enumerate(parts()):
        left = end - time.monotonic()
        part.run(out / f"part-{number}", min(left, 60 * given.minutes * part.share))
        document["parts"][part.name] = part.found
        print(f"{part.name}: {part.found['status']}", flush=True)
        text = json.dumps(document, indent=1)
        (out / "gpu_check.json").write_text(text + "\n", encoding="utf-8")
    print(f"\n{table(document)}\n\n{out / 'gpu_check.json'}")
    bad = [found for found in document["parts"].values() if found["status"].startswith("failed")]
    return 1 if bad else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
