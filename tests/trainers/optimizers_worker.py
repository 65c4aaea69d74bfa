"""Trains with optimizers of other libraries, with and without measurement."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_optimizer
import schedulefree
from accelerate import Accelerator
from torch.optim import SGD, AdamW

from tests.pytorch.loop import Loop

warnings.simplefilter("ignore")


class WithClosure(Loop):
    """The first call gives the loss that is trained on, the optimizer calls the second."""

    def update(self) -> None:
        def closure() -> float:
            loss = self.loss(0) / 64
            loss.backward()
            return float(loss)

        self.optimizer.step(closure)


class Swapping(Loop):
    """Evaluates at the averaged weights between the step and the measurement."""

    def afterwards(self, step: int) -> None:
        self.optimizer.eval()
        self.loss(0)
        self.optimizer.train()


class Accumulating(Loop):
    """accelerate's optimizer steps at every second call."""

    micro_batches = 2

    def make_optimizer(self) -> Any:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.model, optimizer = self.accelerator.prepare(
            self.model, SGD(self.model.parameters(), lr=self.lr)
        )
        return optimizer

    def loss(self, i: int) -> Any:
        return super().loss(i)

    def step(self, step: int) -> None:
        before, total = self.weights(), 0.0
        for i in range(2):
            with self.accelerator.accumulate(self.model):
                loss = self.loss(i) / 64
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.item() / 2
        self.trained[step], self.ends[step] = total, (before, self.weights())
        record = self.measure(step)
        if record is not None:
            self.records[step] = record

    def digest(self) -> str:
        self.optimizer = self.optimizer.optimizer
        return super().digest()


def made(kind: type[Loop], lr: float, optimizer: Callable[[Any], Any]) -> type[Loop]:
    class Made(kind):  # type: ignore[misc, valid-type]
        def make_optimizer(self) -> Any:
            made = optimizer(self.model.parameters())
            if hasattr(made, "train"):
                made.train()
            return made

    Made.lr = lr
    return Made


def sgd(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.3)


LOOPS: dict[str, type[Loop]] = {
    "schedule-free AdamW": made(
        Loop, 0.05, lambda p: schedulefree.AdamWScheduleFree(p, lr=0.05, warmup_steps=2)
    ),
    "schedule-free SGD": made(Loop, 0.3, lambda p: schedulefree.SGDScheduleFree(p, lr=0.3)),
    "schedule-free, swapped": made(
        Swapping, 0.05, lambda p: schedulefree.AdamWScheduleFree(p, lr=0.05)
    ),
    "Lookahead": made(Loop, 0.3, lambda p: pytorch_optimizer.Lookahead(sgd(p), k=3, alpha=0.9)),
    "SAM": made(WithClosure, 0.3, lambda p: pytorch_optimizer.SAM(p, SGD, lr=0.3, rho=0.5)),
    "Lion": made(Loop, 1e-2, lambda p: pytorch_optimizer.Lion(p, lr=1e-2)),
    "Prodigy": made(Loop, 1.0, lambda p: pytorch_optimizer.Prodigy(p, lr=1.0)),
    "accelerate": Accumulating,
    "AdamW": made(Loop, 1e-2, lambda p: AdamW(p, lr=1e-2)),
}


def compare(loop: type[Loop]) -> dict[str, Any]:
    off, on = loop(0).run(6), loop(3).run(6)
    return {
        "same": off.digest() == on.digest(),
        "records": [
            {**asdict(record), "trained": on.trained[step],
             "true": on.true_critical_lr(step) if on.micro_batches == 1 else None}
            for step, record in on.records.items()
        ],
    }  # fmt: skip


if __name__ == "__main__":
    results = {name: compare(loop) for name, loop in LOOPS.items()}
    Path(sys.argv[1], "rank0.json").write_text(json.dumps(results))
