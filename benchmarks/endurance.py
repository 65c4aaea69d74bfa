"""Whether a long run that is measured at every iteration ends as the plain one, through faults.

Megatron under torchrun on two data-parallel ranks, in bf16 with the distributed optimizer and with
dropout, three times from the same seed:

    plain      nothing is measured and nothing goes wrong
    measured   at every iteration, and nothing goes wrong
    faulty     at every iteration, and in turn the disk under the JSON lines is full, torchrun gets
               a SIGTERM, a rank is killed, one raises an exception and one evaluates a NaN, all but
               the first in the midst of a measurement

The faulty run goes on from Megatron's checkpoints: torchrun itself starts the ranks again after the
death of one, and is started again after the SIGTERM.

    losses, end   of every iteration, and hashes of all that training has changed, on each rank,
                  compared with those of the plain run bit for bit
    records       compared with those of the measured run, but for the seconds
    memory        after a garbage collection, at 150 of the iterations; the slope of a straight line
                  from the second third of a process's life on, by least squares through the means
                  of 10 blocks, and its standard error: samples depend on those beside them, and
                  means hardly do
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ranks
from benchmarks.results import ROOT, markdown

ITERATIONS = 3000
RANKS = 2
BLOCKS = 10

#: What names the faults of a run, and after how many iterations its memory is looked at.
PLAN, SAMPLE = "BENCHMARK_PLAN", "BENCHMARK_SAMPLE"

MEGATRON = """
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32
--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4
--lr-decay-style cosine --lr-warmup-fraction 0.02 --weight-decay 0.1 --clip-grad 1.0 --mock-data
--tokenizer-type NullTokenizer --vocab-size 255 --split 100,0,0 --eval-interval 100000
--eval-iters 0 --log-interval 1 --hidden-dropout 0.1 --attention-dropout 0.1 --bf16
--use-distributed-optimizer --use-precision-aware-optimizer --ckpt-format torch_dist
--exit-signal-handler --distributed-timeout-minutes 2
"""

#: What is looked at of a process's memory, and how a slope is written.
MEMORY = {
    "resident": ("resident bytes", ",.0f"),
    "allocated": ("allocated bytes", ",.1f"),
    "blocks": ("Python's blocks", ".2f"),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """At which iteration what goes wrong.

    Attributes:
        full, freed: the first one with a full disk, and the first one after them.
        sigterm: torchrun is to end.
        kill: the last rank is gone.
        exception: the last rank raises.
        nan: the last rank's loss is NaN.
    """

    full: int
    freed: int
    sigterm: int
    kill: int
    exception: int
    nan: int


@dataclass(frozen=True)
class Ran:
    """What a run has left.

    Attributes:
        rows: of each rank, what was written down of each iteration, in the order of time.
        ends: of each rank, hashes of all that training has changed.
        records: of the JSON lines, in the order of time, without their seconds.
        cut: lines of these that are no records.
        curves: iterations that TensorBoard has a point of, of Megatron's loss and of ours.
        output: of all processes.
    """

    rows: list[list[Row]]
    ends: list[dict[str, str]]
    records: list[Row]
    cut: list[str]
    curves: dict[str, set[int]]
    output: str

    @property
    def last_records(self) -> dict[int, Row]:
        """By iteration, the last one of those that were measured twice."""
        return {record["iteration"]: record for record in self.records}


def run(iterations: int = ITERATIONS) -> dict[str, Any]:
    faults = Plan(*(round(share * iterations) for share in (0.1, 0.15, 0.3, 0.55, 0.75, 0.85)))
    ran = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, every in (("plain", 0), ("measured", 1), ("faulty", 1)):
            print(f"endurance: {name}", file=sys.stderr, flush=True)
            planned = faults if name == "faulty" else None
            ran[name] = train(Path(folder, name), iterations, every, planned)
    return {
        "settings": {"megatron": MEGATRON.split(), "iterations": iterations, **asdict(faults)},
        "results": {
            "runs": {name: summary(each, ran["plain"]) for name, each in ran.items()},
            "faults": costs(ran["faulty"], ran["measured"], faults),
        },
    }


def train(folder: Path, iterations: int, every: int, faults: Plan | None) -> Ran:
    """A run to its end, started a second time where faults are planned.

    Raises:
        RuntimeError: it does not come to its end; the message ends with its output.
    """
    folder.mkdir()
    command = [
        *ranks.torchrun(RANKS, "--max-restarts", "1"),
        *ranks.MEGATRON, "benchmarks/megatron_endurance.py",
        *MEGATRON.split(), "--train-iters", str(iterations), "--save", f"{folder}/checkpoints",
        "--load", f"{folder}/checkpoints", "--save-interval", str(iterations // 12),
        "--tensorboard-dir", str(folder), "--measure-critical-sharpness-every", str(every),
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1", ranks.OUT: str(folder), SAMPLE: str(math.ceil(iterations / 150)),
        # Else torchrun hands ranks that it starts again a store with the addresses of those before.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    if torch.cuda.device_count() < RANKS:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if faults is not None:
        environment[PLAN] = json.dumps(asdict(faults))
    for _ in range(1 if faults is None else 2):
        with (folder / "output.txt").open("ab") as output:
            launcher = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                launcher.wait()
            finally:
                launcher.terminate()  # and it ends its ranks
                launcher.wait()
    if launcher.returncode:
        raise RuntimeError((folder / "output.txt").read_text(errors="replace")[-6000:])
    return read(folder)


def read(folder: Path) -> Ran:
    log = folder / "critical_sharpness.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return Ran(
        rows=[_rows(folder / f"rank{rank}.jsonl") for rank in range(RANKS)],
        ends=[json.loads((folder / f"end{rank}.json").read_text()) for rank in range(RANKS)],
        records=[{**json.loads(line), "seconds": None} for line in whole],
        cut=[line for line in lines if not line.endswith("}")],
        curves=_curves(folder),
        output=(folder / "output.txt").read_text(errors="replace"),
    )


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _curves(folder: Path) -> dict[str, set[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0}, purge_orphaned_data=False).Reload()
    tags = {*events.Tags()["scalars"]} & {"lm loss", "critical-sharpness-seconds"}
    return {tag: {point.step for point in events.Scalars(tag)} for tag in tags}


def summary(ran: Ran, plain: Ran) -> dict[str, Any]:
    """A run beside the plain one."""
    differ, missing = 0, 0
    for rows, expected in zip(ran.rows, plain.rows, strict=True):
        losses = {row["iteration"]: row["loss"] for row in expected}
        differ += sum(row["loss"] != losses[row["iteration"]] for row in rows)
        missing += len(losses.keys() - {row["iteration"] for row in rows})
    return {
        "iterations": len(ran.rows[0]),
        "losses_that_differ": differ,
        "losses_missing": missing,
        "end_differs_in": [
            f"{name} of rank {rank}"
            for rank, (end, expected) in enumerate(zip(ran.ends, plain.ends, strict=True))
            for name in expected
            if end[name] != expected[name]
        ],
        "statuses": dict(Counter(record["status"] for record in ran.last_records.values())),
        "memory": [
            {"rank": rank, **drifts(list(process))}
            for rank, rows in enumerate(ran.rows)
            for _, process in groupby(rows, key=lambda row: row["process"])
        ],
    }


def drifts(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one process: its iterations, and the slope and its error of each kind of memory."""
    first, last = rows[0]["iteration"], rows[-1]["iteration"]
    begin = first + (last - first) / 3
    later = [row for row in rows if row["iteration"] >= begin and "resident" in row]
    iterations = [row["iteration"] for row in later]
    slopes = {kind: drift(iterations, [row[kind] for row in later]) for kind in MEMORY}
    return {"first": first, "last": last, **slopes}


def drift(iterations: Sequence[float], values: Sequence[float]) -> list[float]:
    """The slope of a straight line through the means of blocks, and its standard error."""
    blocks = min(BLOCKS, len(values))
    x, y = (
        np.array([block.mean() for block in np.array_split(np.array(each, dtype=float), blocks)])
        for each in (iterations, values)
    )
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    left = y - slope * x
    error = math.sqrt((left @ left) / (blocks - 2) / (x @ x))
    return [float(f"{value:.3g}") for value in (slope, error)]


def costs(faulty: Ran, measured: Ran, faults: Plan) -> dict[str, Any]:
    """What the faults have cost in records, beside those of the measured run."""
    found, expected = faulty.last_records, measured.last_records
    starts = [
        next(process)["iteration"]
        for _, process in groupby(faulty.rows[-1], key=lambda row: row["process"])
    ]
    twice = [record for record in faulty.records if record is not found[record["iteration"]]]
    printed = re.findall(r"critical sharpness at iteration +(\d+)", faulty.output)
    before = [n for n in found if n < faults.exception]
    after = [
        _difference(found[n], expected[n])
        for n in found
        if n > faults.exception and found[n]["status"] == expected[n]["status"] == "found"
    ]
    nan = found[faults.nan]
    return {
        "not_in_the_file": sorted(expected.keys() - found.keys()),
        "not_printed": sorted(expected.keys() - {int(n) for n in printed}),
        "said": faulty.output.count("JsonLinesSink could not write"),
        "cut_lines": len(faulty.cut),
        "started_at": starts,
        "measured_twice": len(twice),
        "differ_the_second_time": sum(found[each["iteration"]] != each for each in twice),
        "not_in_tensorboard": {
            tag: len(points - faulty.curves[tag]) for tag, points in measured.curves.items()
        },
        "before_the_exception": len(before),
        "differ_before_the_exception": sum(found[n] != expected[n] for n in before),
        "failed": {
            str(n): record["reason"]
            for n, record in found.items()
            if record["status"] == "failed"
        },
        "nan": {
            "status": nan["status"],
            **dict(zip(("off", "stated"), _difference(nan, expected[faults.nan]), strict=True)),
        },
        "after_the_exception": len(after),
        "within_twice_the_stated": sum(off <= 2 * stated for off, stated in after),
    }


def _difference(one: Row, other: Row) -> tuple[float, float]:
    """Of two η_c, relative, and the uncertainty that both records state of it."""
    difference = abs(one["critical_lr"] / other["critical_lr"] - 1)
    return difference, math.hypot(one["critical_lr_error"], other["critical_lr_error"])


def table(document: dict[str, Any]) -> str:
    settings, results = document["settings"], document["results"]
    runs, faults = results["runs"], results["faults"]
    compared = markdown(
        ("run", "iterations trained", "losses that differ", "end differs in", "records"),
        (
            (name, f"{run['iterations']:,}", run["losses_that_differ"],
             ", ".join(run["end_differs_in"]) or "nothing",
             ", ".join(f"{count:,} {status}" for status, count in run["statuses"].items()) or "–")
            for name, run in runs.items()
        ),
    )  # fmt: skip
    swallowed, again = faults["not_in_the_file"], faults["started_at"]
    curves = faults["not_in_tensorboard"]
    cost = markdown(
        ("fault", "at", "what it has cost"),
        (
            ("a full disk under the JSON lines", f"{settings['full']}–{settings['freed'] - 1}",
             f"{len(swallowed)} records in the file, {len(faults['not_printed'])} in the training "
             f"log; said {_times(faults['said'])}"),
            ("SIGTERM to torchrun", settings["sigterm"], f"nothing: went on at {again[1]}"),
            ("a rank killed", settings["kill"],
             f"went on at {again[2]}; {faults['measured_twice']} measured again, "
             f"{faults['differ_the_second_time']} of them otherwise; "
             f"{curves['critical-sharpness-seconds']} points of our curves in TensorBoard, "
             f"{curves['lm loss']} of Megatron's"),
            ("an exception on a rank", settings["exception"],
             f"its number: failed, {faults['failed'].get(str(settings['exception']))}"),
            ("a NaN on a rank", settings["nan"],
             f"{faults['nan']['status']}, η_c off by {faults['nan']['off']:.1%} at a stated "
             f"{faults['nan']['stated']:.1%}"),
            ("all before the exception", f"1–{settings['exception'] - 1}",
             f"{faults['differ_before_the_exception']} of {faults['before_the_exception']:,} "
             "records differ from the measured run's"),
            ("all after it", f"{settings['exception'] + 1}–{settings['iterations']}",
             f"{faults['after_the_exception'] - faults['within_twice_the_stated']} of "
             f"{faults['after_the_exception']:,} η_c are off by more than twice what is stated"),
        ),
    )  # fmt: skip
    memory = markdown(
        ("memory an iteration", "rank", "iterations of a process",
         *(name for name, _ in MEMORY.values())),
        (
            (name, process["rank"], f"{process['first']}–{process['last']}",
             *(" ± ".join(format(value, form) for value in process[kind])
               for kind, (_, form) in MEMORY.items()))
            for name, run in runs.items()
            for process in run["memory"]
        ),
    )  # fmt: skip
    return "\n\n".join((compared, cost, memory))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
