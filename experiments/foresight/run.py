"""Trainings whose loss spikes, with η/η_c of the whole and of two parts at every step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments import training
from experiments.gpt_wsd import run as gpt
from experiments.learning_rate.run import LAYERS
from megatron_sharpness.core.measurement import PART, TRAIN, rate_over_critical
from megatron_sharpness.pytorch import CriticalSharpness

STEPS, WARMUP = 500, 10
#: Those that broke first in experiments/parts, by the names of parameters.
PARTS = {"attention": r"\.(qkv|proj)\.", "mlp": r"\.(up|down)\."}
#: η/η_c where the loss rises at once.
AT_ONCE = 1e9


@dataclass(frozen=True)
class Case:
    """A training that may spike: a constant learning rate after a short warm-up.

    Attributes:
        optimizer: ``adamw``, ``muon`` or ``sgd``.
        rate: the learning rate.
        sequences: of a batch.
        bad: every so many steps a batch is random bytes; 0 for never.
        seed: of weights and data.
        beta2: of AdamW; a slow one lags behind gradients that grow.
    """

    optimizer: str
    rate: float
    sequences: int
    bad: int
    seed: int
    beta2: float = 0.95

    def __str__(self) -> str:
        name = f"{self.optimizer}-{self.rate:g}-{self.sequences}-{self.bad}-{self.seed}"
        return name if self.beta2 == 0.95 else f"{name}-{self.beta2:g}"

    def is_bad(self, step: int) -> bool:
        return bool(self.bad) and step % self.bad == 0


#: Thresholds are chosen on seed 0, and tried on the others.
CASES = [
    Case(optimizer, rate, sequences, bad, seed, beta2)
    for seed in range(3)
    for optimizer, rate, sequences, bad, beta2 in (
        ("adamw", 0.03, 16, 0, 0.999), ("adamw", 0.1, 16, 0, 0.999), ("adamw", 0.3, 16, 0, 0.999),
        ("adamw", 0.5, 16, 0, 0.95), ("adamw", 1.0, 16, 0, 0.95), ("adamw", 3.0, 16, 0, 0.95),
        ("adamw", 0.03, 4, 0, 0.999), ("sgd", 1.0, 16, 0, 0.95),
        ("muon", 0.3, 16, 0, 0.95), ("muon", 0.6, 16, 0, 0.95),
        ("sgd", 0.4, 16, 0, 0.95), ("sgd", 0.6, 16, 0, 0.95),
        ("adamw", 0.03, 16, 60, 0.999), ("muon", 0.1, 16, 60, 0.95),
    )
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trained:
    """A training, step by step.

    Attributes:
        case: what was trained.
        loss, grad_norm: of each step; it ends where the loss is not finite.
        ratio, attention, mlp: η/η_c of the whole update, and of the parts' alone; NaN where it is
            not told.
    """

    case: Case
    loss: NDArray[np.float64]
    grad_norm: NDArray[np.float64]
    ratio: NDArray[np.float64]
    attention: NDArray[np.float64]
    mlp: NDArray[np.float64]

    def to_json(self) -> str:
        """Four digits."""
        columns = {
            name: [None if math.isnan(v) else float(f"{v:.4g}") for v in getattr(self, name)]
            for name in COLUMNS
        }
        return json.dumps({"case": asdict(self.case), **columns}, separators=(",", ":"))

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Trained:
        """From what :meth:`to_json` wrote."""
        return cls(Case(**row["case"]), *(np.array(row[name], float) for name in COLUMNS))


COLUMNS = ("loss", "grad_norm", "ratio", *PARTS)


def trained(rows: Iterable[training.Row]) -> dict[str, Trained]:
    """Those in records, by the name of the case."""
    return {str(each.case): each for each in map(Trained.from_row, rows)}


def run(case: Case) -> Trained:
    """One of the trainings."""
    network = gpt.model(LAYERS, seed=case.seed)
    optimizers = gpt.optimizers_of(case.optimizer, network)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if "betas" in group:
            group["betas"] = (group["betas"][0], case.beta2)
    sharpness = CriticalSharpness(network, optimizers, every=1, parts=PARTS)

    def tokens_at(step: int) -> Tensor:
        if case.is_bad(step):
            generator = torch.Generator().manual_seed(step)
            return torch.randint(256, (case.sequences, gpt.LENGTH + 1), generator=generator)
        return gpt.windows(gpt.text(), case.sequences, gpt.LENGTH, 100_000 * case.seed + step)

    rows: list[list[float]] = []
    for _, loss, norm in gpt.steps_of(
        network,
        optimizers,
        sharpness,
        steps=STEPS,
        tokens_at=tokens_at,
        lr_at=lambda step: case.rate * min(1.0, step / WARMUP),
    ):
        records = [sharpness.records[name] for name in (TRAIN, *(PART + part for part in PARTS))]
        ratios = [rate_over_critical(r.status, r.lr_over_critical) for r in records]
        rows.append([loss, norm, *(math.nan if r is None else min(r, AT_ONCE) for r in ratios)])
    return Trained(case, *np.array(rows).T)
