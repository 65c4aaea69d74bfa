"""Runs of the real Megatron on the CPU, and what they left behind."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.megatron.forks import Fork
from tests.processes import ROOT, Rendezvous, start_ranks

__all__ = ["MODEL", "OBSERVED", "ROOT", "Run", "finish", "run", "start", "training_lines"]

#: A process that trains.
Rank = subprocess.Popen[bytes] | Fork

OBSERVED = Path(__file__).with_name("observed_pretrain.py")

#: A GPT of 2 layers and width 32 on Megatron's mock data, with dropout on.
MODEL = """
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32
--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 6
--lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1
--clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --split 100,0,0
--eval-interval 1000 --eval-iters 0 --log-interval 1 --hidden-dropout 0.1 --attention-dropout 0.1
"""


def other_data(folder: Path) -> Path:
    """Ten sums, of which the results count, in tokens that :data:`MODEL` knows."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sums.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": f"{7 * i} plus {i + 3}?", "answer": f" it is {8 * i + 3}."})
            + "\n"
            for i in range(10)
        )
    )
    return path


def training_lines(output: str) -> list[str]:
    """The lines of Megatron's training log in the output of a run, without times."""
    lines = [line for line in output.splitlines() if re.search(r"iteration +\d+/", line)]
    return [
        re.sub(r"^.*?iteration|elapsed time per iteration \(ms\): [\d.]+ \|", "", line)
        for line in lines
    ]


@dataclass
class Run:
    """A finished run: its exit code, output, records and the hashes of each rank."""

    returncode: int
    output: str
    folder: Path

    @property
    def all_records(self) -> list[dict[str, Any]]:
        path = self.folder / "tensorboard" / "critical_sharpness.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Those of the step's own batch."""
        return [r for r in self.all_records if r["batch"] == "train" and r["part"] is None]

    @property
    def part_records(self) -> list[dict[str, Any]]:
        """Those of the updates of parts of the model."""
        return [record for record in self.all_records if record["part"] is not None]

    @property
    def relative_records(self) -> list[dict[str, Any]]:
        """Those of other data."""
        return [record for record in self.all_records if record["batch"] != "train"]

    @property
    def timeless_records(self) -> list[dict[str, Any]]:
        return [{**record, "seconds": 0.0} for record in self.all_records]

    @property
    def hashes(self) -> list[dict[str, str]]:
        return [json.loads(p.read_text()) for p in sorted(self.folder.glob("rank*.json"))]

    @property
    def training_lines(self) -> list[str]:
        return training_lines(self.output)

    def expect_success(self) -> Run:
        assert self.returncode == 0, self.output[-6000:]
        return self


def run(folder: Path, flags: str, *, timeout: float = 180.0, **options: Any) -> Run:
    """Train and wait for the end; ``options`` are those of :func:`start`."""
    return finish(start(folder, flags, **options), folder, timeout)


def start(
    folder: Path,
    flags: str,
    *,
    processes: int = 1,
    every: int = 0,
    script: Path = OBSERVED,
    model: str = MODEL,
    environment: dict[str, str] | None = None,
    pythonpath: list[str] | None = None,
    module: str | None = "megatron_sharpness.megatron",
) -> list[Rank]:
    """Start ``processes`` processes of a training script as torchrun would.

    They are forks of one that has the installed Megatron imported, unless another one is to be
    used (``pythonpath``), or our module is not (``module``).
    """
    command = [str(script), *shlex.split(model), *shlex.split(flags)]
    command += ["--tensorboard-dir", str(folder / "tensorboard")]
    if every:
        command += ["--measure-critical-sharpness-every", str(every)]
    environment = {"OBSERVED_OUT": str(folder), **(environment or {})}
    if module is not None and pythonpath is None:
        folder.mkdir(parents=True, exist_ok=True)
        rendezvous = Rendezvous(processes)
        return [
            Fork(rendezvous, rank, command, environment, folder) for rank in range(processes)
        ]
    command = [*(["-m", module] if module else []), *command]
    return start_ranks(
        command, folder, processes, environment=environment, pythonpath=pythonpath or ()
    )


def finish(processes: Sequence[Rank], folder: Path, timeout: float) -> Run:
    """Wait for all; once one has failed, the others are given a little time and then ended."""
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0) for process in processes):
                deadline = min(deadline, time.monotonic() + 10.0)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        hung = [rank for rank, process in enumerate(processes) if process.poll() is None]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    output = "".join(
        (folder / f"output{rank}.txt").read_text(errors="replace")
        for rank in range(len(processes))
    )
    failed = next((code for code in codes if code not in (0, -9)), None)
    code = failed if failed is not None else max(codes, key=abs)
    return Run(code, output + (f"\nstopped: ranks {hung} hung" if hung else ""), folder)
