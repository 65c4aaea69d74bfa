"""Trains with each optimizer under each layout, without and with measurement, and resumed.

``python -m tests.trainers.optimizer_matrix_worker FOLDER``, one process a rank; the names are those
of the table of docs/pytorch.md.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # some compile their step, which takes a while

import bitsandbytes
import pytorch_optimizer
import schedulefree
import torch
import torch.distributed as dist
import torchao.optim
import transformers.optimization
from emerging_optimizers import soap
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW

from megatron_sharpness.pytorch import CriticalSharpness
from tests.digest import hash_of
from tests.pytorch import gpt
from tests.pytorch.layouts import (
    Optimizers,
    Wrapped,
    adafactor,
    ddp,
    fsdp2,
    muon_and_adamw,
    plain,
    trained,
)
from tests.pytorch.training import Loss, critical_fraction, whole_weights

warnings.simplefilter("ignore")

#: Wide enough for moments in few bits: those of small parameters are kept in 32.
gpt.WIDTH, gpt.LAYERS = 64, 1

Wrap = Callable[[gpt.GPT], Wrapped]


def of_all(make: Callable[[Any], Any]) -> Optimizers:
    def optimizers(model: nn.Module) -> list[Any]:
        made = make(trained(model))
        if hasattr(made, "train"):
            made.train()
        return [made]

    return optimizers


def of_matrices(make: Callable[[Any], Any]) -> Optimizers:
    """And AdamW of the rest."""

    def optimizers(model: nn.Module) -> list[Any]:
        names = dict(model.named_parameters())
        matrices = [p for name, p in names.items() if "blocks" in name and p.dim() == 2]
        held = {id(parameter) for parameter in matrices}
        return [make(matrices), AdamW([p for p in trained(model) if id(p) not in held], lr=3e-3)]

    return optimizers


OPTIMIZERS: dict[str, Optimizers] = {
    "torch.optim.Adafactor": adafactor,
    "torch.optim.Muon": muon_and_adamw,
    "transformers.Adafactor": of_all(
        lambda p: transformers.optimization.Adafactor(p, lr=1e-2, relative_step=False)
    ),
    "bitsandbytes.optim.AdamW8bit": of_all(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2)),
    "torchao.optim.AdamW8bit": of_all(lambda p: torchao.optim.AdamW8bit(p, lr=1e-2)),
    "torchao.optim.AdamW4bit": of_all(lambda p: torchao.optim.AdamW4bit(p, lr=1e-2)),
    "schedulefree.AdamWScheduleFree": of_all(lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2)),
    "schedulefree.SGDScheduleFree": of_all(lambda p: schedulefree.SGDScheduleFree(p, lr=0.1)),
    "pytorch_optimizer.Muon": of_matrices(
        lambda p: pytorch_optimizer.Muon([{"params": p, "use_muon": True}], lr=2e-2)
    ),
    "pytorch_optimizer.Shampoo": of_all(
        lambda p: pytorch_optimizer.Shampoo(p, lr=0.1, preconditioning_compute_steps=2)
    ),
    "pytorch_optimizer.SOAP": of_all(
        lambda p: pytorch_optimizer.SOAP(p, lr=3e-3, precondition_frequency=2)
    ),
    "emerging_optimizers.soap.SOAP": of_matrices(lambda p: soap.SOAP(p, lr=3e-3)),
}

STEPS, EVERY = 4, 2


class Run:
    """A training that can be saved and resumed.

    Attributes:
        records: of its measurements.
        weights: whole, before each step and after the last.
    """

    def __init__(
        self, wrap: Wrap, optimizers: Optimizers, *, every: int = EVERY, dropout: float = 0.2
    ) -> None:
        self.model = gpt.make_gpt(dropout)
        wrapped = wrap(self.model)
        self.called, self.rank, self.ranks = wrapped.model, wrapped.data_rank, wrapped.data_size
        self.optimizers = optimizers(self.called)
        self.every = every
        self.sharpness = self.measuring()
        self.records: list[dict[str, Any]] = []
        self.weights = [whole_weights(self.model)]
        torch.manual_seed(100 + self.rank)

    def measuring(self) -> CriticalSharpness:
        return CriticalSharpness(self.called, self.optimizers, self.every, tolerance=1e-2)

    def train(self, steps: range) -> Run:
        for step in steps:
            self.step(step)
            self.weights.append(whole_weights(self.model))
        return self

    def step(self, step: int) -> None:
        batches = [gpt.make_batch(step, 0, rank) for rank in range(self.ranks)]
        tokens = sum(int((targets != gpt.IGNORED).sum()) for _, targets in batches)

        def evaluate() -> tuple[Tensor, int]:
            loss, own = gpt.loss_sum(self.called, batches[self.rank])
            return loss, int(own)

        loss, own = evaluate()
        (loss * self.ranks / tokens).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        record = self.sharpness.after_step(step, evaluate, loss=(loss.detach(), own))
        if record is not None:
            self.records.append(dataclasses.asdict(record) | {"seconds": 0})

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        held = [part.state_dict() for part in (self.model, *self.optimizers, self.sharpness)]
        torch.save({"held": held, "random": torch.get_rng_state()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> Run:
        state = torch.load(file, weights_only=False)
        self.sharpness.close()
        for held, part in zip(state["held"], (self.model, *self.optimizers), strict=False):
            part.load_state_dict(held)
        self.sharpness = self.measuring()
        self.sharpness.load_state_dict(state["held"][-1])
        torch.set_rng_state(state["random"])
        return self

    def digest(self) -> str:
        """Of all that training reads later, on this rank."""
        states = [v for o in self.optimizers for s in o.state.values() for v in s.values()]
        tensors = [value for value in states if isinstance(value, Tensor)]
        model = [*self.called.parameters(), *self.called.buffers()]
        return hash_of(model, tensors, torch.get_rng_state())


def compare(wrap: Wrap, optimizers: Optimizers) -> dict[str, Any]:
    """Training with dropout, off and on; then a step without it, evaluated anew."""
    off = Run(wrap, optimizers, every=0)
    try:
        off.train(range(STEPS))
    except RuntimeError as error:  # the optimizer's own
        return {"error": str(error)}
    on = Run(wrap, optimizers).train(range(STEPS))
    measured = Run(wrap, optimizers, dropout=0.0).train(range(EVERY + 1))
    record = measured.records[-1]
    return {
        "same": on.digest() == off.digest(),
        "records": on.records,
        "record": record,
        "anew": anew(measured.weights, record, measured.ranks),
    }


def resume(optimizers: Optimizers) -> dict[str, Any]:
    """A run, and one that goes on from its checkpoint in the middle."""
    run = Run(plain, optimizers).train(range(STEPS // 2))
    file = run.saved()
    uninterrupted = run.train(range(STEPS // 2, STEPS)).digest()
    again = Run(plain, optimizers).load(file).train(range(STEPS // 2, STEPS))
    return {
        "records": run.records[-len(again.records) :],
        "again": again.records,
        "same": again.digest() == uninterrupted,
    }


def anew(weights: list[dict[str, Tensor]], record: dict[str, Any], ranks: int) -> dict[str, float]:
    """L, the slope and η_c along that step from its two ends, in fp64 on one process."""
    model = Loss(gpt.make_gpt(0.0).double())
    start, end = ({k: v.double() for k, v in weights[i].items()} for i in (EVERY, EVERY + 1))

    def loss(fraction: Tensor) -> Tensor:
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for rank in range(ranks):
            at = {f"model.{k}": torch.lerp(v, end[k], fraction) for k, v in start.items()}
            at["model.passes"] = start["passes"].clone()
            part, count = functional_call(model, at, (gpt.make_batch(EVERY, 0, rank),))
            total, tokens = total + part, tokens + int(count)
        return total / tokens

    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    at_zero = loss(zero)
    (derivative,) = torch.autograd.grad(at_zero, zero)
    ends = {
        side: torch.tensor(record[f"critical_lr_{side}"] / record["lr"], dtype=torch.float64)
        for side in ("lower", "upper")
    }
    with torch.no_grad():
        return {
            "loss": at_zero.item(),
            "slope": -derivative.item() / record["lr"],
            "critical_lr": critical_fraction(loss) * record["lr"],
            **{side: loss(fraction).item() for side, fraction in ends.items()},
        }


def main(folder: Path) -> None:
    several = os.environ["WORLD_SIZE"] != "1"
    if several:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    wraps = {"DDP": ddp, "FSDP2": fsdp2()} if several else {"one process": plain}
    results: dict[str, Any] = {}
    for name, optimizers in OPTIMIZERS.items():
        results[name] = {layout: compare(wrap, optimizers) for layout, wrap in wraps.items()}
        if not several:
            results[name]["resumed"] = resume(optimizers)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
