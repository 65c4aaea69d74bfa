"""Sweeps of the learning rate: GPTs, three optimizers, and η/η_c along each training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments import training
from experiments.gpt_wsd import run as gpt
from megatron_sharpness.core.measurement import edge_of_stability
from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.report.records import Run

STEPS, WARMUP, EVERY = 600, 20, 5
#: The share of the steps in which ``wsd`` decays, and what is left of the rate in the end.
DECAY, LAST_RATE = 0.3, 0.05
LAYERS, LENGTH = 2, 64
WEIGHT_DECAY = 0.1
#: The last part of the text is not trained on; so many pieces of it give the final loss.
HELD_OUT, PIECES = 0.1, 256

RECORDS = Path(__file__).parent / "records"

#: The lowest rate of each optimizer, in decades; the rates go over four from there.
LOWEST = {"adamw": -4, "muon": -4, "sgd": -3}


@dataclass(frozen=True)
class Case:
    """What is trained at each of the rates of its optimizer."""

    optimizer: str
    width: int
    sequences: int
    schedule: str
    seed: int

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.width}-{self.sequences}-{self.schedule}-{self.seed}"

    @property
    def rates(self) -> tuple[float, ...]:
        if self == FIVE:
            return FIVE_RATES
        in_a_decade = 3 if self in CHOSEN_ON else 2
        lowest = LOWEST[self.optimizer]
        return tuple(
            float(f"{10 ** (lowest + number / in_a_decade):.3g}")
            for number in range(4 * in_a_decade + 1)
        )

    @property
    def path(self) -> Path:
        """Where its trainings are kept."""
        return RECORDS / f"{self}.jsonl"


#: Five trainings of one model, for the figure of docs/reading.md.
FIVE = Case("adamw", 64, 16, "wsd", 2)
FIVE_RATES = (1e-4, 3e-3, 3e-2, 0.3, 3.0)
#: What rules are chosen on.
CHOSEN_ON = [
    *(Case(optimizer, 64, 16, s, 0) for optimizer in LOWEST for s in ("wsd", "cosine")),
    Case("adamw", 32, 4, "wsd", 0),
    Case("muon", 32, 4, "wsd", 0),
]
#: And what they are tried on: other seeds, widths, batches and schedules.
TRIED_ON = [
    Case(optimizer, width, sequences, schedule, 1)
    for width, sequences, schedule in (
        (64, 16, "wsd"), (64, 4, "constant"), (32, 16, "cosine"), (128, 4, "wsd"), (32, 64, "wsd"),
        (128, 16, "cosine"),
    )
    for optimizer in LOWEST
]  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        case, peak: what was trained, and the largest learning rate.
        final: loss on text that was held out, in the end; infinite where it is not finite.
        steps: how many were made: fewer where the loss was no longer finite.
        measured: at every ``EVERY`` steps the loss and η_c, or the status where none was found.
    """

    case: Case
    peak: float
    final: float
    steps: int
    measured: list[tuple[float | None, float | str]]

    @property
    def run(self) -> Run:
        """As ``megatron-sharpness report`` reads it."""
        records = [
            _record(self.case, self.peak, EVERY * number, loss, seen)
            for number, (loss, seen) in enumerate(self.measured, 1)
        ]
        return Run(f"η = {self.peak:g}", records)

    def to_json(self) -> str:
        values = asdict(self) | {"final": training.short(self.final, 5)}
        values["measured"] = [training.short(list(each), 5) for each in self.measured]
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Training:
        """From what :meth:`to_json` wrote."""
        values = dict(row)
        values["case"] = Case(**values["case"])
        values["final"] = math.inf if values["final"] is None else values["final"]
        values["measured"] = [tuple(row) for row in values["measured"]]
        return cls(**values)


def read() -> Iterator[Training]:
    """All trainings that were kept."""
    for rows in training.read(RECORDS.parent).values():
        yield from map(Training.from_row, rows)


def _record(
    case: Case, peak: float, step: int, loss: float | None, seen: float | str
) -> training.Row:
    lr = learning_rate(case, peak, step)
    row: training.Row = {"iteration": step, "batch": "train", "lr": lr, "loss": loss}
    row |= {"status": "found" if isinstance(seen, float) else seen}
    row["tokens"] = case.sequences * LENGTH
    if isinstance(seen, float):
        row |= {"critical_lr": seen, "critical_sharpness": 2.0 / seen}
        row |= {"lr_over_critical": lr / seen}
    return row | {"edge_of_stability": edge_of_stability(lr, WEIGHT_DECAY)}


def learning_rate(case: Case, peak: float, step: int) -> float:
    """Linear warm-up, and then the schedule."""
    rate = peak * min(1.0, step / WARMUP)
    if case.schedule == "cosine":
        done = max(0.0, (step - WARMUP) / (STEPS - WARMUP))
        rate *= LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * done))
    elif case.schedule == "wsd":
        done = max(0.0, (step / STEPS - (1.0 - DECAY)) / DECAY)
        rate *= 1.0 - done * (1.0 - LAST_RATE)
    return rate


def run(case: Case, peak: float) -> Training:
    """One training."""
    trained, held_out = gpt.texts(HELD_OUT)
    network = gpt.model(LAYERS, case.width, case.seed)
    optimizers = gpt.optimizers_of(case.optimizer, network)
    sharpness = CriticalSharpness(network, optimizers, every=EVERY)
    measured: list[tuple[float | None, float | str]] = []
    step = 0
    for step, *_ in gpt.steps_of(
        network,
        optimizers,
        sharpness,
        steps=STEPS,
        tokens_at=lambda step: gpt.windows(
            trained, case.sequences, LENGTH, 100_000 * case.seed + step
        ),
        lr_at=lambda step: learning_rate(case, peak, step),
    ):
        if step % EVERY == 0:
            record = sharpness.records.train
            measured.append((record.loss, record.critical_lr or record.status))
    with torch.no_grad():
        final = gpt.loss(network, gpt.windows(held_out, PIECES, LENGTH, 0)).item()
    return Training(case, peak, final, step, measured)
