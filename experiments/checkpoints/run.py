"""Does a series of checkpoints show what was measured during the training?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import training
from megatron_sharpness import cli
from megatron_sharpness.data.tokenize import VOCAB_SIZE, python_prose, write_dataset

ROOT = Path(__file__).parents[2]
STEPS, WARMUP, DECAY, SAVED_EVERY = 600, 60, 150, 50
#: Batches at each checkpoint, and steps that warm the moments where they are not its own.
MEASURED, ACCUMULATED = 30, 100
#: β₁ of the training; those of further ones, and their checkpoints.
BETA1, OTHERS, SOME = 0.9, (0.0, 0.5), (200, 300, 400)
#: Steps of the training around a checkpoint, whose median λ_c is compared.
AROUND = 20

FLAGS = f"""--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64
--max-position-embeddings 64 --position-embedding-type rope --vocab-size {VOCAB_SIZE}
--tokenizer-type NullTokenizer --hidden-dropout 0 --attention-dropout 0 --bf16
--micro-batch-size 8 --global-batch-size 16 --train-iters {STEPS} --lr 5e-3 --min-lr 2e-4
--lr-warmup-iters {WARMUP} --lr-decay-style WSD --lr-wsd-decay-style linear
--lr-wsd-decay-iters {DECAY} --lr-decay-iters {STEPS} --adam-beta2 0.99 --weight-decay 0.1
--split 100,0,0 --eval-iters 0 --eval-interval 10000 --log-interval 50 --ckpt-format torch_dist"""


def command(folder: Path, beta1: float) -> list[str]:
    """Training in Megatron on two processes, without saving."""
    data = folder / "prose"
    if not data.with_suffix(".bin").exists():
        write_dataset(data, python_prose())
    return [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", "2"),
        *("-m", "megatron_sharpness.megatron", str(ROOT / "launch" / "pretrain_gpt.py")),
        *FLAGS.split(),
        *("--adam-beta1", str(beta1)),
        *("--data-path", str(data), "--data-cache-path", str(folder / "cache")),
    ]


def train(folder: Path, beta1: float) -> list[training.Row]:
    """The training, every step of it measured, and a checkpoint every :data:`SAVED_EVERY`."""
    training.progress(f"training with β₁ = {beta1:g}: two minutes")
    log = folder / f"in_run_{beta1:g}.jsonl"
    log.unlink(missing_ok=True)
    saved = str(folder / f"saved_{beta1:g}")
    subprocess.run(
        [
            *command(folder, beta1),
            *("--save", saved, "--save-interval", str(SAVED_EVERY)),
            *("--measure-critical-sharpness-every", "1", "--critical-sharpness-log", str(log)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    kept = ("iteration", "status", "critical_sharpness", "lr", "loss")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: row[key] for key in kept} for row in rows]


def series(
    folder: Path, beta1: float, moments: str, iterations: Sequence[int] = ()
) -> list[training.Row]:
    """λ_c of each batch at each checkpoint."""
    out = folder / f"{moments.replace(':', '-')}_{beta1:g}"
    some = ["--iterations", *map(str, iterations)] if iterations else []
    status = cli.main(
        ["checkpoints", "--out", str(out), "--load", str(folder / f"saved_{beta1:g}"), *some,
         "--moments", moments, "--measure", str(MEASURED), "--", *command(folder, beta1)]
    )  # fmt: skip
    if status:
        raise RuntimeError(f"the series with --moments {moments} ended with {status}")
    rows = []
    for path in sorted(out.glob("iter_*.jsonl")):
        found = [json.loads(line)["critical_sharpness"] for line in path.read_text().splitlines()]
        rows.append({"iteration": int(path.stem.removeprefix("iter_")), "sharpness": found})
    return rows


def medians(rows: list[training.Row]) -> dict[int, float]:
    """Of a series, by iteration."""
    return {
        row["iteration"]: float(np.median([x for x in row["sharpness"] if x is not None]))
        for row in rows
    }


def in_run_medians(rows: list[training.Row], iterations: Any) -> dict[int, float]:
    """Of the training's own measurements around each of these iterations."""
    steps = training.column(rows, "iteration")
    values = training.column(rows, "critical_sharpness")
    return {n: float(np.nanmedian(values[np.abs(steps - n) <= AROUND // 2])) for n in iterations}


def drift(
    in_run: list[training.Row], own_moments: list[training.Row]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """λ_c of each batch, in the median over checkpoints, over that of the training around them."""
    there = in_run_medians(in_run, [row["iteration"] for row in own_moments])
    ratios = [
        np.array(row["sharpness"], dtype=float) / there[row["iteration"]] for row in own_moments
    ]
    return np.asarray(np.nanmedian(ratios, axis=0))


def reproduction(
    in_run: list[training.Row], own_moments: list[training.Row]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """λ_c of the first batch at each checkpoint, with its own moments, over that of the step that
    the training made from there."""
    there = {row["iteration"]: row["critical_sharpness"] for row in in_run}
    pairs = [(row["sharpness"][0], there.get(row["iteration"] + 1)) for row in own_moments]
    return np.array([a / b for a, b in pairs if a is not None and b is not None])
