"""Trains a layout with and without measurement, on this process or as one rank of several."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from megatron_sharpness.core.measurement import OVER
from megatron_sharpness.core.replay import of_all_ranks
from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.pytorch.losses import Evaluate
from tests.digest import hash_of, random_states

from .gpt import loss_sum, make_batch, make_gpt
from .layouts import DEVICE, DISTRIBUTED, GPU, SINGLE, Layout

STEPS, EVERY = 4, 2
#: The step whose batch is the other data.
OTHER = 99


@dataclasses.dataclass
class Trained:
    """What is left of a run on one rank: a hash of each part, and the records."""

    hashes: dict[str, str]
    records: list[dict[str, Any]]
    others: list[dict[str, Any]]  # of the loss on other data
    parts: list[dict[str, Any]]  # of the updates of parts of the model
    weights: list[dict[str, Tensor]]  # whole, before each step and after the last
    moments: list[dict[str, Tensor]]  # whole second moments after each measured step
    data_size: int


def train(
    layout: Layout,
    steps: int,
    *,
    every: int,
    dropout: float,
    keep_weights: bool = False,
    disturb: Callable[[nn.Module, Evaluate], Evaluate] | None = None,
) -> Trained:
    """Train for a few steps; the schedule changes the learning rate at each.

    ``disturb`` is given the first step's ``evaluate`` and returns what is called instead.
    """
    random.seed(1)
    np.random.seed(1)
    model = make_gpt(dropout, checkpointed=layout.checkpointed).to(DEVICE, layout.parameters)
    wrapped = layout.wrap(model)
    called, data_rank, data_size = wrapped.model, wrapped.data_rank, wrapped.data_size
    optimizers = layout.optimizers(called)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.3 * step))
        for optimizer in optimizers
    ]
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8, enabled=layout.scaled)
    torch.manual_seed(100 + data_rank)

    def other() -> tuple[Tensor, int]:
        batch = tuple(tensor.to(DEVICE) for tensor in make_batch(OTHER, 0, data_rank))
        with layout.forward():
            loss, tokens = loss_sum(called, batch)
        return (torch.zeros(()), 0) if wrapped.repeats else (loss, int(tokens))

    sharpness = None
    adam = any("betas" in group for optimizer in optimizers for group in optimizer.param_groups)
    if every:
        sharpness = CriticalSharpness(
            called, optimizers, every, losses={"other": other}, watch="always", parts="modules",
            adam_snr=adam, **layout.options,
        )  # fmt: skip
    losses, records, others, parts, weights, moments = [], [], [], [], [], []
    trained: tuple[Tensor, int] = (torch.zeros(()), 0)
    for step in range(steps):
        if keep_weights:
            weights.append(whole_weights(model))
        batches = [
            tuple(tensor.to(DEVICE) for tensor in make_batch(step, i, data_rank))
            for i in range(layout.micro_batches)
        ]
        total = sum(
            int(make_batch(step, i, rank)[1].ge(0).sum())
            for i in range(layout.micro_batches)
            for rank in range(data_size)
        )

        def evaluate() -> tuple[Tensor, int]:
            with layout.forward():
                pairs = [loss_sum(called, batch) for batch in batches]  # noqa: B023
            if wrapped.repeats:
                return torch.zeros(()), 0
            return torch.stack([loss for loss, _ in pairs]).sum(), sum(int(n) for _, n in pairs)

        def backward() -> Tensor:
            nonlocal trained
            summed, count = torch.zeros((), device=DEVICE), 0
            for batch in batches:  # noqa: B023
                torch.rand(1)  # as a loop does that augments its data
                with layout.forward():
                    loss, tokens = loss_sum(called, batch)
                count += int(tokens)
                # Gradients are averaged over the data-parallel ranks.
                scaler.scale(loss * data_size / total).backward()  # type: ignore[no-untyped-call]  # noqa: B023
                summed += loss.detach()
            trained = (torch.zeros(()), 0) if wrapped.repeats else (summed, count)
            return summed

        norm = None
        if layout.closure:
            (optimizer,) = optimizers
            losses.append(optimizer.step(backward))  # type: ignore[arg-type]
        else:
            losses.append(backward())
            if layout.clip:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(called.parameters(), layout.clip)
            if not layout.steps_itself:
                for optimizer in optimizers:
                    scaler.step(optimizer)
        scaler.update()
        torch.rand(1), random.random(), np.random.rand()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.zero_grad()
            schedule.step()
        if sharpness is not None:
            given = evaluate if disturb is None or step else disturb(model, evaluate)
            record = sharpness.after_step(step, given, loss=trained, grad_norm=norm)
            if record is not None:
                records.append(dataclasses.asdict(record))
                others.append(dataclasses.asdict(sharpness.records["other"]))
                parts += [dataclasses.asdict(r) for r in sharpness.records.values() if r.part]
                if keep_weights and adam:
                    moments.append(whole_moments(model, optimizers))
    if keep_weights:
        weights.append(whole_weights(model))
    hashes = {
        "parameters": hash_of(called.parameters()),
        "buffers": hash_of(called.buffers()),
        "optimizers": hash_of(
            value
            for optimizer in optimizers
            for state in getattr(optimizer, "optim", optimizer).state.values()
            for _, value in sorted(state.items())
            if isinstance(value, Tensor)
        ),
        "random": hash_of(random_states(), device_random_state()),
        "losses": hash_of(losses),
        "scaler": str(scaler.state_dict()),
        "modes": str([module.training for module in called.modules()]),
    }
    return Trained(hashes, records, others, parts, weights, moments, data_size)


def device_random_state() -> Tensor:
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.empty(0)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that the unwrapped model gives them, on every rank."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = whole.detach().cpu().clone()
    return found


def whole_moments(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Adam's second moments of the matrices, by name, on every rank."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    states = [getattr(o, "optim", o).state for o in optimizers]
    found = {}
    for parameter, state in [pair for each in states for pair in each.items()]:
        moments = state.get("exp_avg_sq")
        if moments is not None and parameter.dim() == 2:
            whole = moments.full_tensor() if isinstance(moments, DTensor) else moments
            found[names[id(parameter)]] = whole.double().cpu()
    return {name: v for rank in of_all_ranks(found) for name, v in rank.items()}


def ratios_of(moments: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """SNR_K of each kind of matrix, from the equation."""
    kinds: dict[str, list[Tensor]] = {}
    for name, v in moments.items():
        of_rows, of_columns, whole = (v.unbind(0), v.unbind(1), (v,))
        found = []
        for groups in (of_rows, of_columns, whole):
            seen = [g for g in groups if g.min() < g.max()]
            found.append(torch.stack([g.mean() ** 2 / g.var(correction=0) for g in seen]).mean())
        kind = re.sub(r"blocks\.\d+", "blocks", name)
        kinds.setdefault(kind, []).append(torch.stack(found))
    return {
        kind: dict(zip(OVER, torch.stack(rows).mean(dim=0).tolist(), strict=True))
        for kind, rows in kinds.items()
    }


def reference(layout: Layout, size: int, weights: list[dict[str, Tensor]], step: int) -> Reference:
    """The same numbers from whole weights on one process in fp64, from the equations.

    Args:
        size: data-parallel ranks whose batches make up the step's.
        weights: before each step and after the last.
        step: which one.
    """
    model = make_gpt(0.0).double()
    start, end = ({k: v.double() for k, v in weights[i].items()} for i in (step, step + 1))
    model.train(layout.options.get("mode") != "eval")

    def loss(fraction: Tensor, of: int = step, part: str = "") -> Tensor:
        losses, tokens = [], 0
        for rank in range(size):
            passes = (start if of == step else end)["passes"].clone()
            for i in range(layout.micro_batches if of == step else 1):
                at = {
                    name: torch.lerp(value, end[name], fraction) if part in part_of(name) else value
                    for name, value in start.items()
                    if name != "passes"
                }
                total, count = functional_call(
                    Loss(model),
                    {"model." + k: v for k, v in at.items()} | {"model.passes": passes},
                    (make_batch(of, i, rank),),
                )
                losses.append(total)
                tokens += int(count)
        return torch.stack(losses).sum() / tokens

    lr = max(
        group["initial_lr"] if "initial_lr" in group else group["lr"]
        for optimizer in layout.optimizers(make_gpt(0.0))
        for group in optimizer.param_groups
    ) / (1.0 + 0.3 * step)
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    at_zero = loss(zero)
    (derivative,) = torch.autograd.grad(at_zero, zero)
    critical = critical_fraction(loss)
    parts = {}
    for part in PARTS:
        (along,) = torch.autograd.grad(loss(zero, part=part), zero)
        found = critical_fraction(lambda fraction, p=part: loss(fraction, part=p))
        parts[part] = (-along.item() / lr, found * lr)
    model.eval()
    relative = critical_fraction(lambda fraction: loss(fraction, OTHER))
    norm = sum(float((start[k] - end[k]).square().sum()) for k in start if k != "passes") ** 0.5
    return Reference(
        at_zero.item(), -derivative.item() / lr, norm / lr, critical * lr, relative * lr, parts
    )


#: What ``modules`` makes of this model.
PARTS = ("norms", "embeddings", "attention", "mlp")


def part_of(name: str) -> str:
    """Written out here, from the model; with the frozen positions in none."""
    if name.startswith(("embedding.", "head.")):
        return "embeddings"
    if "norm" in name:
        return "norms"
    return "mlp" if ".up." in name or ".down." in name else "attention" * ("blocks" in name)


@torch.no_grad()
def critical_fraction(loss: Callable[[Tensor], Tensor]) -> float:
    """The smallest fraction at which the loss is above its start; 0 where it rises at once, and
    infinite where it does not."""

    def falls(fraction: float) -> bool:
        return bool(loss(torch.tensor(fraction, dtype=torch.float64)) <= at_zero)

    at_zero = loss(torch.zeros((), dtype=torch.float64))
    lower, upper = 0.0, 2.0**-10
    while falls(upper):
        lower, upper = upper, upper * 1.25
        if upper > 1e5:  # a thousand times η_c, as farther is not looked
            return math.inf
    for _ in range(30 if lower else 0):
        middle = 0.5 * (lower + upper)
        lower, upper = (middle, upper) if falls(middle) else (lower, middle)
    return lower


class Loss(nn.Module):
    """``loss_sum`` as a module, to call with other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return loss_sum(self.model, batch)


@dataclasses.dataclass
class Reference:
    loss: float
    slope: float
    update_norm: float
    critical_lr: float
    relative_critical_lr: float
    parts: dict[str, tuple[float, float]]  # slope and η_c of each


def compare(layout: Layout, *, with_reference: bool = True) -> dict[str, Any]:
    """Training with dropout, off and on; then the number without it, beside the reference."""
    off = train(layout, STEPS, every=0, dropout=0.2)
    on = train(layout, STEPS, every=EVERY, dropout=0.2)
    # In 16 bits the noise of the weights hides where a bracket as narrow as this would end.
    tolerance = None if layout.computes_in_low_precision else 1e-3
    narrow = dataclasses.replace(layout, options={"tolerance": tolerance, **layout.options})
    measured = train(narrow, EVERY + 1, every=EVERY, dropout=0.0, keep_weights=True)
    step = EVERY
    return {
        "off": off.hashes,
        "on": on.hashes,
        "records": on.records,
        "others": on.others,
        "record": next(r for r in measured.records if r["iteration"] == step),
        "other": next(r for r in measured.others if r["iteration"] == step),
        "parts": [r for r in measured.parts if r["iteration"] == step],
        "parts while training": on.parts,
        "adam_snr": ratios_of(measured.moments[-1]) if measured.moments else None,
        "tokens": sum(
            int(make_batch(step, i, rank)[1].ge(0).sum())
            for i in range(layout.micro_batches)
            for rank in range(measured.data_size)
        ),
        "reference": with_reference
        and dataclasses.asdict(reference(layout, measured.data_size, measured.weights, step)),
    }


def main(folder: Path) -> None:
    """One rank: every layout in turn, and what it found in a file for each."""
    rank = os.environ["RANK"]
    if DEVICE == "cuda":
        torch.use_deterministic_algorithms(True)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(seconds=60))
        layouts = SINGLE | DISTRIBUTED | GPU
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        layouts = DISTRIBUTED
    for name, layout in layouts.items():
        try:
            found = compare(layout, with_reference=rank == "0")
        except BaseException:
            found = {"error": traceback.format_exc()}
        partial = folder / f"{rank}.partial"
        partial.write_text(json.dumps(found))
        partial.rename(folder / f"{name} {rank}.json")
        if "error" in found and dist.get_world_size() > 1:
            os._exit(1)  # the other ranks may wait in a collective
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
