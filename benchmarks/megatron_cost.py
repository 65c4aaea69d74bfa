"""What a measurement costs inside a real Megatron run, as ratios to its training iterations.

Trains a small GPT in two processes on the CPU, in turns without and with a measurement every 10
iterations, and prints for each layout

    evaluation   one forward pass of the search ÷ one training iteration
    measurement  all of one measurement ÷ one training iteration
    run          wall time of the measured run ÷ of the run before it, over the same iterations

The floor of ``evaluation`` is a forward pass alone, about a third of a training iteration; that of
``measurement`` is three of them, one to locate the critical learning rate and two to certify it.

    python benchmarks/megatron_cost.py
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "megatron_cost.json"
ITERATIONS, EVERY, FIRST, REPETITIONS = 80, 10, 20, 3

MODEL = f"""
--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 128
--max-position-embeddings 128 --position-embedding-type rope --attention-dropout 0
--hidden-dropout 0 --micro-batch-size 4 --global-batch-size 16 --train-iters {ITERATIONS}
--mock-data --tokenizer-type NullTokenizer --vocab-size 257 --split 100,0,0 --eval-iters 0
--eval-interval 1000 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant --log-interval 1 --bf16
--use-distributed-optimizer
"""
LAYOUTS = {
    "TP2 + sequence parallel": "--tensor-model-parallel-size 2 --sequence-parallel",
    "PP2": "--pipeline-model-parallel-size 2",
    "DP2 + overlap": "--overlap-grad-reduce --overlap-param-gather",
}
LINE = re.compile(r"\[(\S+ \S+)\] iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+)")


def train(layout: str, every: int, folder: Path) -> dict[str, Any]:
    """Seconds an iteration, of the whole run after the warm-up, and the records."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "megatron_sharpness.megatron", "--backend", "cpu"]
    command += ["launch/pretrain_gpt.py", *MODEL.split(), *LAYOUTS[layout].split()]
    command += ["--tensorboard-dir", str(folder)]
    if every:
        command += ["--measure-critical-sharpness-every", str(every)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    rows = [match.groups() for match in map(LINE.search, done.stdout.splitlines()) if match]
    rows = [row for row in rows if int(row[1]) >= FIRST]
    moments = [datetime.strptime(row[0], "%Y-%m-%d %H:%M:%S.%f") for row in rows]
    log = folder / "critical_sharpness.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if every else []
    return {
        "iteration": statistics.median(float(row[2]) / 1e3 for row in rows[1:]),
        "whole": (moments[-1] - moments[0]).total_seconds(),
        "records": [record for record in records if record["iteration"] > FIRST],
    }


def spread(values: Sequence[float]) -> list[float]:
    return [min(values), statistics.median(values), max(values)]


def measure(layout: str) -> dict[str, Any]:
    evaluation, measurement, run, evaluations = [], [], [], []
    for repetition in range(REPETITIONS):
        with tempfile.TemporaryDirectory() as folder:
            plain = train(layout, 0, Path(folder, "plain"))
            measured = train(layout, EVERY, Path(folder, "measured"))
        for record in measured["records"]:
            evaluations.append(record["evaluations"])
            measurement.append(record["seconds"] / measured["iteration"])
            evaluation.append(measurement[-1] / record["evaluations"])
        run.append(measured["whole"] / plain["whole"])
        print(f"  {layout}: {repetition + 1} of {REPETITIONS}", file=sys.stderr, flush=True)
    return {
        "evaluations": statistics.mean(evaluations),
        "evaluation": spread(evaluation),
        "measurement": spread(measurement),
        "run": spread(run),
        "every 100": statistics.median(measurement) / 100,
    }


def main() -> None:
    results = {layout: measure(layout) for layout in LAYOUTS}
    RESULTS.write_text(
        json.dumps(
            {
                "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
                "versions": {name: version(name) for name in ("torch", "megatron-core")},
                "settings": {"iterations": ITERATIONS, "every": EVERY, "model": MODEL.split()},
                "results": results,
            },
            indent=2,
        )
        + "\n"
    )
    print("ratios to a training iteration: minimum / median / maximum")
    print(f"{'layout':26}{'passes':>7}{'evaluation':>20}{'measurement':>20}"
          f"{f'run, every {EVERY}':>20}{'every 100':>11}")  # fmt: skip
    for layout, result in results.items():
        cells = "".join(
            f"{' / '.join(f'{value:.2f}' for value in result[name]):>20}"
            for name in ("evaluation", "measurement", "run")
        )
        print(f"{layout:26}{result['evaluations']:7.1f}{cells}{result['every 100']:11.2%}")


if __name__ == "__main__":
    main()
