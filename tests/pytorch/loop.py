"""A loop of one's own, with and without measurement, which subclasses change in as many ways."""

from __future__ import annotations

import copy
import hashlib
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.state import State
from megatron_sharpness.pytorch import CriticalSharpness

from .training import critical_fraction

INPUTS = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(3))
TARGETS = INPUTS[..., :3].argmax(-1)


def net(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 3))


class Loop:
    """A loop of a few steps, on micro-batches; a subclass changes what is special about it.

    Attributes:
        trained: the loss of each step, by number.
        ends: the weights before and after each step.
    """

    lr = 0.3
    micro_batches = 1

    def __init__(self, every: int = 2, **options: Any) -> None:
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        self.model = self.make_model()
        self.optimizer = self.make_optimizer()
        self.sharpness = CriticalSharpness(
            self.model, self.given(), every, **{"tolerance": 1e-3, **options}
        )
        self.records: dict[int, Measurement] = {}
        self.trained: dict[int, float] = {}
        self.ends: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def make_model(self) -> nn.Module:
        return net()

    def make_optimizer(self) -> Any:
        return SGD(self.model.parameters(), lr=self.lr)

    def given(self) -> Any:
        """What is given to CriticalSharpness."""
        return self.optimizer

    def loss(self, i: int) -> Tensor:
        """Sum over a micro-batch."""
        return F.cross_entropy(self.model(INPUTS[i]), TARGETS[i], reduction="sum")

    def evaluate(self) -> tuple[Any, int]:
        losses = [self.loss(i) for i in range(self.micro_batches)]
        return torch.stack(losses).sum(), 64 * self.micro_batches

    def update(self) -> None:
        self.optimizer.step()

    def afterwards(self, step: int) -> None:
        """Between the step and the measurement."""

    def measure(self, step: int) -> Measurement | None:
        return self.sharpness.after_step(step, self.evaluate)

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().double().clone() for n, p in self.model.named_parameters()}

    def step(self, step: int) -> None:
        before, total = self.weights(), 0.0
        for i in range(self.micro_batches):
            loss = self.loss(i) / (64 * self.micro_batches)
            loss.backward()
            total += loss.item()
        self.update()
        self.optimizer.zero_grad()
        self.trained[step], self.ends[step] = total, (before, self.weights())
        self.afterwards(step)
        record = self.measure(step)
        if record is not None:
            self.records[step] = record

    def run(self, steps: int = 4) -> Loop:
        for step in range(1, steps + 1):
            self.step(step)
        return self

    def digest(self) -> str:
        """Of all that training reads later."""
        held = State({"model": self.model}, parameters=True)
        states = [v for s in getattr(self.optimizer, "state", {}).values() for v in s.values()]
        tensors = [*held.tensors.values(), *(v for v in states if isinstance(v, Tensor))]
        digest = hashlib.sha256()
        for tensor in [*tensors, torch.get_rng_state()]:
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        plain = {name: value for name, value in held.plain.items() if "hooks" not in name}
        digest.update(repr((plain, random.getstate(), np.random.get_state())).encode())
        return digest.hexdigest()

    def true_critical_lr(self, step: int) -> float:
        """η_c of that step without dropout, from its two ends, in fp64."""
        before, after = self.ends[step]
        model = copy.deepcopy(self.model).double()

        def loss(fraction: Tensor) -> Tensor:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.lerp(before[name], after[name], fraction))
                return F.cross_entropy(model(INPUTS[0].double()), TARGETS[0])

        return critical_fraction(loss) * self.lr


def check_same(loop: type[Loop], **options: Any) -> Loop:
    """Trains with and without measurement, to the same bit; returns the one with."""
    measured = loop(2, **options).run()
    assert loop(0).run().digest() == measured.digest()
    assert list(measured.records) == [2, 4]
    return measured


def check_found(loop: type[Loop], **options: Any) -> Loop:
    """And the loss is the trained one, with its masks."""
    measured = check_same(loop, **options)
    for step, record in measured.records.items():
        assert record.status == "found", record.reason
        assert record.loss == pytest.approx(measured.trained[step], rel=1e-6)
    return measured


def check_failed(loop: type[Loop], *said: str, **options: Any) -> Loop:
    measured = check_same(loop, **options)
    for record in measured.records.values():
        assert record.status == "failed" and record.critical_lr is None
        for words in said:
            assert words in str(record.reason)
    return measured
