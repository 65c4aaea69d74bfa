"""Which part of a GPT breaks first, along a training with Muon and AdamW, and with AdamW alone."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from experiments import training
from experiments.gpt_wsd import run as gpt
from megatron_sharpness.pytorch import CriticalSharpness

RATE = 5e-3
#: Optimizer and preset; AdamW alone has one group.
RUNS = (("adamw", "modules"), ("muon", "modules"), ("muon", "groups"))
#: What is kept of a record.
FIELDS = (
    "iteration", "batch", "part", "status", "lr", "loss", "slope", "critical_lr",
    "critical_sharpness", "lr_over_critical", "edge_of_stability", "evaluations",
)  # fmt: skip


def run(optimizer: str, preset: str) -> list[training.Row]:
    """Records of the whole and of each part, in the schedule ``wsd`` of ``gpt_wsd``."""
    network = gpt.model()
    optimizers = gpt.optimizers_of(optimizer, network)
    sharpness = CriticalSharpness(network, optimizers, every=gpt.EVERY, parts=preset)
    rows: list[training.Row] = []
    for step, *_ in gpt.steps_of(
        network,
        optimizers,
        sharpness,
        steps=gpt.STEPS,
        tokens_at=gpt.batch_at,
        lr_at=lambda step: gpt.learning_rate("wsd", RATE, step),
    ):
        if step % gpt.EVERY == 0:
            records = [json.loads(record.to_json()) for record in sharpness.records.values()]
            rows += [{field: record[field] for field in FIELDS} for record in records]
    return rows


def of_part(rows: Iterable[training.Row], part: str | None) -> list[training.Row]:
    """The records of one part, or of the whole model."""
    return [row for row in rows if row["part"] == part]


def parts_in(rows: Iterable[training.Row]) -> list[str]:
    """The parts in the order that they were measured in."""
    return list(dict.fromkeys(row["part"] for row in rows if row["part"] is not None))


def stable_ratio(rows: Iterable[training.Row], part: str | None) -> float:
    """Median η/η_c of a part in the stable phase; 0 where the loss never rises along its update."""
    found = [
        0.0 if row["status"] == "no_upper" else row["lr_over_critical"]
        for row in of_part(rows, part)
        if gpt.WARMUP < row["iteration"] <= gpt.STEPS - gpt.DECAY
    ]
    return float(np.median([ratio for ratio in found if ratio is not None]))


def passes(rows: Iterable[training.Row]) -> float:
    """Mean forward passes of a part's search, from the second measurement of it on."""
    searches = [row for part in parts_in(rows) for row in of_part(rows, part)[1:]]
    return float(np.mean([row["evaluations"] for row in searches]))
