"""λ_c against the size of the batch, on the step's own batch and on another one."""

from __future__ import annotations

import copy
import json

import numpy as np

from experiments import training
from experiments.gpt_wsd import run as gpt
from megatron_sharpness.pytorch import CriticalSharpness

#: Steps of training before, at this learning rate and the batch size of ``gpt_wsd``.
STEPS, LR = 150, 5e-3
SIZES = (4, 16, 64, 256)
REPEATS = 8
BATCHES = ("own", "other")


def run(size: int) -> list[training.Row]:
    """One more step from the same weights with ``size`` sequences, for :data:`REPEATS` of them.

    Two records each, ``batch`` being ``own``, the gradient's, or ``other``, a new one as large.
    """
    network = gpt.model()
    optimizer = gpt.optimizer_of(network)
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, step / gpt.WARMUP)
        optimizer.zero_grad()
        gpt.loss(network, gpt.batch_at(step)).backward()
        optimizer.step()

    rows = []
    for repeat in range(REPEATS):
        own, other = (gpt.batch_at(10_000 + 2 * repeat + i, size) for i in range(2))
        model = copy.deepcopy(network)
        stepped = gpt.optimizer_of(model)
        # load_state_dict keeps the tensors that it is given, and a step changes them in place.
        stepped.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        sharpness = CriticalSharpness(
            model, stepped, every=1, losses={"other": lambda m=model, b=other: (gpt.loss(m, b), 1)}
        )
        stepped.zero_grad()
        gpt.loss(model, own).backward()
        stepped.step()
        record = sharpness.after_step(repeat, lambda m=model, b=own: (gpt.loss(m, b), 1))
        assert record is not None
        for name, of in zip(BATCHES, (record, sharpness.records["other"]), strict=True):
            row = json.loads(of.to_json())
            rows.append(row | {"batch": name, "tokens": size * gpt.LENGTH})
    return rows


def sharpness_of(rows: list[training.Row], batch: str) -> np.ndarray:
    """λ_c of the records on ``batch`` that have one, ascending."""
    values = training.column([row for row in rows if row["batch"] == batch], "critical_sharpness")
    return np.sort(values[np.isfinite(values)])
