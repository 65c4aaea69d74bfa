"""Training with λ_c measured and exact curvature beside it, and the records of it."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.reference import exact_curvature
from megatron_sharpness.report.records import column as column  # of records, NaN where missing

#: A measurement's fields, and ``exact_directional_sharpness``, ``hessian_sharpness``,
#: ``preconditioned_sharpness`` where exact curvature was computed.
Row = dict[str, Any]
#: Records by the name of their run.
Runs = dict[str, list[Row]]
#: What is claimed, the case that a number of ours is of, the number, and the range in which it
#: bears the claim out.
Found = Iterator[tuple[str, str, float, float, float]]


def train(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Callable[[nn.Module, Any], Tensor],
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    every: int,
    exact_every: int,
    lr_at: Callable[[int], float] | None = None,
    tolerance: float = 1 / 16,
    hessian: bool = True,
) -> list[Row]:
    """The measurements of a run.

    Args:
        model: in training, without dropout.
        optimizer: of ``model``.
        loss: the mean loss of a batch.
        batch_at: the batch of a step; steps count from 1.
        steps: how many.
        every: measure λ_c at each step that this divides.
        exact_every: compute the exact curvature too at each step that this divides.
        lr_at: the learning rate of a step; the optimizer's own where it is not given.
        tolerance: of the bracket around η_c.
        hessian: whether λ_max^H belongs to the exact curvature.
    """
    sharpness = CriticalSharpness(model, optimizer, every=every, tolerance=tolerance)
    rows: list[Row] = []
    shown = time.monotonic()
    for step in range(1, steps + 1):
        batch = batch_at(step)
        if lr_at is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step)
        optimizer.zero_grad()
        loss(model, batch).backward()
        exact = step % every == 0 and step % exact_every == 0
        start = [parameter.detach().clone() for parameter in model.parameters()] if exact else []
        optimizer.step()
        record = sharpness.after_step(step, lambda b=batch: (loss(model, b), 1))
        if record is None:
            continue
        row = json.loads(record.to_json())
        if exact:
            lr = max(group["lr"] for group in optimizer.param_groups)
            seen = exact_curvature(
                model, optimizer, start, lr, lambda b=batch: loss(model, b), hessian=hessian
            )
            row["exact_directional_sharpness"] = seen.directional_sharpness
            row["hessian_sharpness"] = seen.hessian_sharpness
            row["preconditioned_sharpness"] = seen.preconditioned_sharpness
        rows.append(row)
        if time.monotonic() - shown > 5 or step == steps:
            shown = time.monotonic()
            progress(f"step {step} of {steps}")
    return rows


def in_parallel(
    function: Callable[..., list[Row]],
    runs: dict[str, tuple[Any, ...]],
    processes: int | None = None,
) -> dict[str, list[Row]]:
    """``function`` of each run's arguments, by name, in so many processes, or one a core."""
    context = multiprocessing.get_context("spawn")
    processes = processes or os.cpu_count()
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        started = {name: pool.submit(function, *arguments) for name, arguments in runs.items()}
        done = {}
        for name, future in started.items():
            done[name] = future.result()
            progress(f"{name}: done")
        return done


def progress(text: str) -> None:
    """A line for who waits."""
    print(f"  {text}", file=sys.stderr, flush=True)


def write(folder: Path, runs: dict[str, list[Row]]) -> None:
    """Each run's records as ``records/<run>.jsonl``, which ``megatron-sharpness report`` reads."""
    (folder / "records").mkdir(exist_ok=True)
    for name, rows in runs.items():
        text = "".join(
            json.dumps({key: short(v) for key, v in row.items()}) + "\n" for row in rows
        )
        (folder / "records" / f"{name}.jsonl").write_text(text)


def read(folder: Path) -> dict[str, list[Row]]:
    """What :func:`write` has written."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / "records").glob("*.jsonl"))
    }


def short(value: Any, digits: int = 6) -> Any:
    """So many digits, in lists and dictionaries too: what is read from a figure, at a third of the
    size. None for a number that is not finite."""
    if isinstance(value, dict):
        return {key: short(held, digits) for key, held in value.items()}
    if isinstance(value, list):
        return [short(held, digits) for held in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
