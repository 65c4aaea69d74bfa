"""Trains under DDP with buffers that forward passes change, as one rank of several."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from megatron_sharpness.core.state import State
from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.pytorch.passes import RecordedPasses
from tests.digest import hash_of
from tests.pytorch.training import critical_fraction
from tests.running_norm import RunningNorm

STEPS, EVERY = 7, 3


@dataclass(frozen=True)
class Kind:
    """What is special about a training.

    Attributes:
        norm: the module with buffers.
        micro_batches: all but the last under ``no_sync``.
        given: what is given to CriticalSharpness: DDP's module, or the one inside.
        differentiates: the loss holds a gradient of its own.
        options: of DDP.
        settings: of CriticalSharpness.
    """

    norm: type[nn.Module] = RunningNorm
    micro_batches: int = 1
    given: str = "outer"
    differentiates: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()


KINDS = {
    "batch norm": Kind(norm=nn.BatchNorm1d),
    "running": Kind(),
    "running, accumulation": Kind(micro_batches=3),
    "batch norm, accumulation": Kind(norm=nn.BatchNorm1d, micro_batches=2),
    "running, inner module given": Kind(given="inner", micro_batches=2),
    "running, evaluation mode": Kind(settings=(("mode", "eval"),)),
    "batch norm, evaluation mode": Kind(norm=nn.BatchNorm1d, settings=(("mode", "eval"),)),
    "running, compiled": Kind(given="compiled"),
    "running, buffers of each rank": Kind(options=(("broadcast_buffers", False),)),
    "a gradient in the loss": Kind(differentiates=True),
    "a gradient in the loss, unused": Kind(
        differentiates=True, options=(("find_unused_parameters", True),)
    ),
    "static graph": Kind(options=(("static_graph", True),)),
}


class Net(nn.Sequential):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__(norm(8), nn.Linear(8, 16), norm(16), nn.Tanh(), nn.Linear(16, 3))

    def add_unused(self) -> None:
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:5]:
            x = layer(x)
        return x


def train(kind: Kind, every: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net(kind.norm)
    if "find_unused_parameters" in dict(kind.options):
        model.add_unused()
    wrapped = DistributedDataParallel(model, **dict(kind.options))
    called = torch.compile(wrapped, backend="eager") if kind.given == "compiled" else wrapped
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(100 + dist.get_rank())
    data = [torch.randn(32, 8) + dist.get_rank() for _ in range(STEPS * kind.micro_batches + 1)]

    def loss(x: Tensor) -> Tensor:
        inputs = x.clone().requires_grad_() if kind.differentiates else x
        outputs = called(inputs)
        found = F.cross_entropy(outputs, x[:, :3].argmax(1), reduction="sum")
        if kind.differentiates:
            (gradient,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
            found = found + gradient.square().sum()
        return found

    sharpness = None
    if every:
        sharpness = CriticalSharpness(
            model if kind.given == "inner" else called, optimizer, every, on_error="raise",
            losses={"other": lambda: (loss_without_gradient(data[-1]), 32)}, **dict(kind.settings),
        )  # fmt: skip

    def loss_without_gradient(x: Tensor) -> Tensor:
        with torch.enable_grad() if kind.differentiates else contextlib.nullcontext():
            return loss(x).detach()

    history, records, others = [], [], []
    for step in range(1, STEPS + 1):
        batches = data[(step - 1) * kind.micro_batches : step * kind.micro_batches]
        total = torch.zeros(())
        for x in batches:
            sync = contextlib.nullcontext() if x is batches[-1] else wrapped.no_sync()
            with sync:
                part = loss(x)
                (part / 32 / kind.micro_batches).backward()
            total += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        if sharpness is not None:
            record = sharpness.after_step(
                step,
                lambda: (torch.stack([loss_without_gradient(x) for x in batches]).sum(),  # noqa: B023
                         32 * kind.micro_batches),
                loss=(total, 32 * kind.micro_batches),
            )  # fmt: skip
            if record is not None:
                records.append(asdict(record))
                others.append(asdict(sharpness.records["other"]))
        history.append(hash_of(model.parameters(), model.buffers(), total, optimizer.state_dict()))
    return {"history": history, "records": records, "others": others}


def number(micro_batches: int, given: str, *, synced: bool = False) -> dict[str, Any]:
    """η_c beside that of a plain bisection, in which every pass sees what the training pass saw:
    rank 0's buffers in the first micro-batch, those of its own rank later on, where gradients are
    not ``synced`` in each. And the loss on other data with rank 0's buffers, which the next pass
    of training would have begun with."""
    torch.manual_seed(0)
    model = Net(RunningNorm)
    wrapped = DistributedDataParallel(model)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(100 + dist.get_rank())
    other = torch.randn(32, 8) + dist.get_rank()
    sharpness = CriticalSharpness(
        wrapped if given == "outer" else model, optimizer, EVERY, tolerance=1e-3,
        losses={"other": lambda: (losses([other]).sum(), 32)},
    )  # fmt: skip

    def losses(batches: list[Tensor]) -> Tensor:
        return torch.stack(
            [F.cross_entropy(wrapped(x), x[:, :3].argmax(1), reduction="sum") for x in batches]
        )

    for step in range(1, EVERY + 1):
        batches = [torch.randn(32, 8) + 3 * dist.get_rank() for _ in range(micro_batches)]
        buffers = [b.clone() for b in model.buffers()]
        start = [p.detach().clone() for p in model.parameters()]
        for x in batches:
            sync = synced or x is batches[-1]
            with contextlib.nullcontext() if sync else wrapped.no_sync():
                (losses([x]).sum() / 32 / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        end = [p.detach().clone() for p in model.parameters()]
        record = sharpness.after_step(
            step,
            lambda: (losses(batches).sum(), 32 * micro_batches),  # noqa: B023
        )

    with torch.no_grad():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        for parameter, weight in zip(model.parameters(), start, strict=True):
            parameter.copy_(weight)
        model.eval()
        other_loss = F.cross_entropy(model(other), other[:, :3].argmax(1))
        dist.all_reduce(other_loss)
        model.train()

    @torch.no_grad()
    def loss_at(fraction: Tensor) -> Tensor:
        for parameter, a, b in zip(model.parameters(), start, end, strict=True):
            parameter.copy_(torch.lerp(a.double(), b.double(), float(fraction)))
        for buffer, held in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(held)
        total = torch.zeros((), dtype=torch.float64)
        for i, x in enumerate(batches):  # a pass without gradients switches it off
            wrapped.require_forward_param_sync = synced or i == 0
            total += losses([x]).double().sum()
        dist.all_reduce(total)
        return total

    assert record is not None
    return {
        "record": asdict(record),
        "critical_lr": critical_fraction(loss_at) * 0.1,
        "other": sharpness.records["other"].loss,
        "other anew": other_loss.item() / dist.get_world_size(),
    }


def join() -> dict[str, Any]:
    """Rank 1 has fewer batches."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    sharpness, reasons = CriticalSharpness(model, optimizer, 2), []
    with model.join(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, 7 - 2 * dist.get_rank()):
            x = torch.randn(32, 8)
            F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            record = sharpness.after_step(step, lambda: (torch.zeros(()), 1))
            if record is not None:
                reasons.append((record.status, record.reason))
    return {"reasons": reasons}


#: Outputs that DDP's reducer was prepared with. A count in the reducer would be put back.
PREPARED: list[Any] = []


class Noted:
    """DDP's reducer, which notes when a pass prepares it for a backward pass."""

    def __init__(self, reducer: Any) -> None:
        self.reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reducer, name)

    def prepare_for_backward(self, outputs: Any) -> None:
        PREPARED.append(outputs)
        self.reducer.prepare_for_backward(outputs)


def prepared() -> int:
    """How often a measurement prepares the reducer, of which the watch sees nothing."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 3))
    model.reducer = Noted(model.reducer)
    optimizer = SGD(model.parameters(), lr=0.1)
    sharpness = CriticalSharpness(model, optimizer, 1)
    x = torch.randn(32, 8)

    def evaluate() -> tuple[Tensor, int]:
        with torch.enable_grad():
            return F.cross_entropy(model(x), x[:, :3].argmax(1), reduction="sum").detach(), 32

    F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
    optimizer.step()
    before = len(PREPARED)
    record = sharpness.after_step(1, evaluate)
    assert record is not None and record.status == "found" and before == 1
    return len(PREPARED) - before


def flag() -> str | None:
    """What the watch says where no one puts DDP's flags back."""
    with (
        mock.patch.object(RecordedPasses, "undisturbed", lambda passes: contextlib.nullcontext()),
        mock.patch.object(State, "restore", lambda state: None),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Linear(8, 3))
        optimizer = SGD(model.parameters(), lr=0.1)
        sharpness = CriticalSharpness(model, optimizer, 1)
        x = torch.randn(32, 8)
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        record = sharpness.after_step(
            1, lambda: (F.cross_entropy(model(x), x[:, :3].argmax(1), reduction="sum"), 32)
        )
    return record and record.reason


def results() -> Iterator[tuple[str, Any]]:
    for name, kind in KINDS.items():
        yield name, {"off": train(kind, 0), "on": train(kind, EVERY)}
    yield "number", number(1, "outer")
    yield "number, accumulation", number(3, "outer")
    yield "number, inner module given", number(2, "inner")
    yield "number, synced in each", number(3, "outer", synced=True)
    yield "join", join()
    yield "flag", flag()
    yield "prepared", prepared()


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = dict(results())
    Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
