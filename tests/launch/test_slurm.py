"""The launchers under a real SLURM: preempted, put back into the queue, resumed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.launch.slurm import Slurm, Unavailable, running_slurm, wait
from tests.megatron.harness import training_lines
from tests.processes import ROOT

#: A GPT of 2 layers and width 32, so long in training that a preemption comes before its end.
CONFIG = """
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32
--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --train-iters {iterations}
--lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1
--clip-grad 1.0 --eval-interval 100000 --eval-iters 0 --log-interval 1
--hidden-dropout 0.0 --attention-dropout 0.0 --bf16
"""
ITERATIONS, EVERY, SAVED = 400, 20, 30
DATA = {
    "gpt": "--mock-data --tokenizer-type NullTokenizer --vocab-size 255 --split 100,0,0",
    "fsdp": f"--text {ROOT / 'README.md'}",
}
#: Megatron saves at the signal, which a process that reads its data gets, too; the FSDP script goes
#: on from the last interval.
FLAGS = {
    "gpt": ["--save-interval", str(ITERATIONS), "--num-workers", "1"],
    "fsdp": ["--save-interval", str(SAVED)],
}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    try:
        with running_slurm() as cluster:
            yield cluster
    except Unavailable as reason:
        pytest.skip(f"no SLURM: {reason}")


@dataclass
class Job:
    """A training that sbatch was given, in a partition of the SLURM."""

    slurm: Slurm
    folder: Path
    launcher: str
    partition: str

    def __post_init__(self) -> None:
        self.folder.mkdir()
        config = self.folder / "gpt.args"
        config.write_text(CONFIG.format(iterations=ITERATIONS))
        self.id = self.slurm.ask(
            "sbatch", "--parsable", f"--partition={self.partition}", "--nodes=1",
            "--gpus-per-node=0", f"--output={self.folder}/output.txt",
            f"launch/slurm_{self.launcher}.sbatch", *FLAGS[self.launcher],
            CONFIG=str(config), DATA=DATA[self.launcher], OUT=str(self.folder), EVERY=str(EVERY),
            PYTHON=sys.executable, PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore",
            BACKEND="cpu", CUDA_VISIBLE_DEVICES="", GPUS_PER_NODE="2", OMP_NUM_THREADS="1",
        )  # fmt: skip

    @property
    def state(self) -> str:
        return self.slurm.job(self.id)["JobState"]

    def expect(self, true: Callable[[], bool]) -> None:
        """Wait for it, while the job does not fail."""
        assert wait(lambda: true() or self.state == "FAILED", 300) and true(), self.output[-6000:]

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")

    @property
    def iterations(self) -> list[int]:
        """Those trained, in the order of the log."""
        return [int(line.split("/")[0]) for line in training_lines(self.output)]

    @property
    def records(self) -> dict[int, dict[str, Any]]:
        """The last of each iteration, without times."""
        path = self.folder / "tensorboard" / "critical_sharpness.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        return {record["iteration"]: {**record, "seconds": None} for record in records}


@pytest.mark.parametrize("launcher", ["gpt", "fsdp"])
def test_a_preempted_training_measures_what_an_uninterrupted_one_does(
    launcher: str, slurm: Slurm, tmp_path: Path
) -> None:
    preempted = Job(slurm, tmp_path / "preempted", launcher, "normal")
    preempted.expect(lambda: len(preempted.records) >= 2)
    whole = Job(slurm, tmp_path / "whole", launcher, "urgent")  # for which the node is needed
    for job, restarts in ((whole, "0"), (preempted, "1")):
        job.expect(lambda job=job: job.state == "COMPLETED")  # type: ignore[misc]
        assert slurm.job(job.id)["Restarts"] == restarts
    assert whole.iterations == list(range(1, ITERATIONS + 1))
    assert list(whole.records) == list(range(EVERY, ITERATIONS + 1, EVERY))
    if launcher == "gpt":
        assert preempted.iterations == whole.iterations
    else:
        # From its last checkpoint: none is made again where it was preempted right at that.
        again = [n for last, n in pairwise(preempted.iterations) if n != last + 1]
        assert len(again) <= 1 and all(n % SAVED == 1 for n in again)
    assert preempted.records == whole.records
    assert training_lines(preempted.output)[-5:] == training_lines(whole.output)[-5:]


def test_a_training_that_srun_starts_is_verified(slurm: Slurm, tmp_path: Path) -> None:
    training = f"""
        srun --partition=urgent --ntasks=1 {sys.executable} -m torch.distributed.run --standalone
        --nproc-per-node 2 launch/fsdp/train.py {DATA["fsdp"]} {CONFIG.format(iterations=100)}
    """
    done = slurm.call(
        sys.executable, "-m", "megatron_sharpness.cli", "verify", "--out", str(tmp_path / "out"),
        "--iterations", "4", "--every", "2", "--", *training.split(),
        PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training with measurement is the same: yes, bit for bit" in done.stdout
