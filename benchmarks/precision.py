"""Whether η_c in bf16 and fp16 is fp32's on the same weights, down to learning rates of 1e-8.

Small GPTs are trained for a while in fp32. From there, nothing being kept, steps are made with
learning rates from 1e-8 to 1e-2, three batches at each, with fp32 weights that the forward pass
reads in fp32, bf16 and fp16: in Megatron with Adam and with Muon, and in PyTorch under autocast.
Each is measured from a cold start, the step's own loss and that on other data, and compared with
fp32. "Fresh" weights are rounded to bf16 beforehand, as those of a model that was just made in it:
they do not follow a short line.

A `found` is right where it is off by no more than the stated uncertainty and 10 %: of two
precisions the gradients differ, and with them the line.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import ranks
from benchmarks.gpt import Size, Training
from benchmarks.results import markdown
from megatron_sharpness import cli
from megatron_sharpness.pytorch import CriticalSharpness

RATES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
BATCHES = 3
WARM = 5  # steps for the optimizer's moments, before the first is measured
#: Relative, beyond the uncertainty that is stated.
ALLOWED = 0.10

TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZE = Size(layers=4, width=64, sequence=64, batch=8, micro_batches=2)

BATCH = 16
MEGATRON = f"""
--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64
--max-position-embeddings 64 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 8
--global-batch-size {BATCH} --tokenizer-type NullTokenizer --vocab-size 257 --split 100,0,0
--eval-iters 0 --eval-interval 10000 --lr 3e-3 --min-lr 3e-3 --lr-decay-style constant
--lr-warmup-iters 20 --adam-beta2 0.95 --log-interval 1 --seed 1234
"""
TRAINED = 120  # iterations
FLAGS = {"fp32": "", "bf16": "--bf16", "fp16": "--fp16 --loss-scale 1024"}
OPTIMIZERS = {
    "Megatron, Adam": ("--optimizer adam", ("fp32", "bf16", "fp16")),
    "Megatron, Muon": ("--optimizer muon", ("fp32", "bf16")),  # which Megatron has not in fp16
}

Rows = list[dict[str, Any]]


def megatron(folder: Path) -> Iterator[dict[str, Any]]:
    data = str(folder / "python")
    cli.main(["tokenize", data, "--python-docs", "prose"])
    cli.main(["tokenize", data + "-code", "--python-docs", "code", "--max-bytes", "1000000"])
    rates = [1e-3] * WARM + [rate for rate in RATES for _ in range(BATCHES)]
    for case, (flags, precisions) in OPTIMIZERS.items():
        weights = folder / "weights.pt"
        environment = {"PRECISION_WEIGHTS": str(weights), "PRECISION_BATCH": str(BATCH)}
        command = [
            *ranks.MEGATRON, "benchmarks/megatron_precision.py", *MEGATRON.split(), *flags.split(),
            "--data-path", data, "--data-cache-path", str(folder / "cache"),
        ]  # fmt: skip
        ranks.launch([*command, "--train-iters", str(TRAINED)], 1, environment)
        frozen = [
            "--train-iters", str(len(rates)), "--measure-critical-sharpness-every", "1",
            "--critical-sharpness-frozen", str(WARM), "--critical-sharpness-eval-data",
            f"code={data}-code",
        ]  # fmt: skip
        environment["PRECISION_RATES"] = json.dumps(rates)
        for fresh in (False, True):
            if fresh:
                whole = torch.load(weights)
                torch.save({name: w.bfloat16().float() for name, w in whole.items()}, weights)
            for precision in precisions[: 2 if fresh else None]:
                records = ranks.launch(
                    [*command, *frozen, *FLAGS[precision].split()], 1, environment
                )
                yield from (_row(case, precision, fresh, record) for record in records)


def pytorch() -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    training = Training(SIZE, lr=3e-3)
    for _ in range(TRAINED):
        training.step()
    other = Training(SIZE, lr=3e-3)  # for its batch alone
    other.backward()
    for fresh in (False, True):
        if fresh:
            with torch.no_grad():
                for parameter in training.model.parameters():
                    parameter.copy_(parameter.bfloat16())
        for precision, dtype in TYPES.items():
            if not (fresh and precision == "fp16"):
                for record in _pytorch(training, other, dtype):
                    yield _row("PyTorch, AdamW, autocast", precision, fresh, record)


def _pytorch(
    training: Training, other: Training, dtype: torch.dtype | None
) -> Iterator[dict[str, Any]]:
    """One precision, from the weights and the state that the training has, and leaving them."""

    def forward() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype, enabled=dtype is not None)

    def evaluate(of: Training = training) -> Any:
        with forward():
            batches, training.batches = training.batches, of.batches
            try:
                return training.evaluate()
            finally:
                training.batches = batches

    start = {name: value.clone() for name, value in training.model.state_dict().items()}
    moments = copy.deepcopy(training.optimizer.state_dict())
    generator = training.generator.get_state()
    sharpness = CriticalSharpness(
        training.model, training.optimizer, 1, losses={"code": lambda: evaluate(other)}
    )
    number = 0
    for rate in RATES:
        for _ in range(BATCHES):
            training.optimizer.load_state_dict(copy.deepcopy(moments))
            training.optimizer.param_groups[0]["lr"] = rate
            with forward():
                training.backward()
            training.optimizer.step()
            sharpness.load_state_dict({})  # each search begins cold, at the learning rate
            sharpness.after_step(number, evaluate)
            number += 1
            for record in sharpness.records.values():
                yield json.loads(record.to_json())
            training.model.load_state_dict(start)
    sharpness.close()
    training.optimizer.load_state_dict(moments)
    training.generator.set_state(generator)


def _row(case: str, precision: str, fresh: bool, record: dict[str, Any]) -> dict[str, Any]:
    kept = (
        "lr", "batch", "status", "critical_lr", "critical_lr_error", "critical_sharpness",
        "directional_sharpness", "evaluations", "noise", "reason",
    )  # fmt: skip
    return {"case": case, "precision": precision, "fresh": fresh} | {k: record[k] for k in kept}


def run() -> dict[str, Any]:
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in (*megatron(Path(folder)), *pytorch()):
            rows.append(row)
        print(f"precision: {len(rows)} measurements", file=sys.stderr, flush=True)
    return {
        "settings": {
            "size": dataclasses.asdict(SIZE), "megatron": MEGATRON.split(), "rates": RATES,
            "batches": BATCHES, "trained": TRAINED, "allowed": ALLOWED,
        },
        "results": rows,
    }  # fmt: skip


def compared(rows: Rows) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each measurement in 16 bits, and the same one in fp32."""
    series: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        key = (row["case"], row["fresh"], row["batch"], row["lr"], row["precision"])
        series.setdefault(key, []).append(row)
    for (*key, precision), found in series.items():
        if precision != "fp32":
            yield from zip(found, series[(*key, "fp32")], strict=True)


def off(row: dict[str, Any], exact: dict[str, Any]) -> float:
    """How far a found η_c is from fp32's, in units of what is allowed."""
    allowed = ALLOWED + row["critical_lr_error"] + exact["critical_lr_error"]
    return abs(row["critical_lr"] / exact["critical_lr"] - 1) / allowed


def table(document: dict[str, Any]) -> str:
    """Statuses by learning rate, and the largest deviation of those that were found."""
    lines: dict[tuple[str, ...], dict[float, Rows]] = {}
    worst: dict[tuple[str, ...], list[float]] = {}
    for row, exact in compared(document["results"]):
        weights = "fresh" if row["fresh"] else "trained"
        key = (row["case"], row["precision"], weights, row["batch"])
        lines.setdefault(key, {}).setdefault(row["lr"], []).append(row)
        if row["status"] == exact["status"] == "found":
            worst.setdefault(key, []).append(abs(row["critical_lr"] / exact["critical_lr"] - 1))

    def cell(found: Rows) -> str:
        counts = Counter(row["status"] for row in found)
        return ", ".join(f"{n} {status}" for status, n in counts.items())

    return markdown(
        ("case", "precision", "weights", "loss", *(f"{rate:g}" for rate in RATES), "largest error"),
        (
            (*key, *(cell(found[rate]) for rate in RATES),
             f"{max(worst[key]):.1%}" if key in worst else "–")
            for key, found in lines.items()
        ),
    )  # fmt: skip
