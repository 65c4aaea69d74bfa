"""What one measurement costs, by each way of making it.

A GPT in training, in one process of PyTorch; at every tenth step, from the same weights, gradients
and optimizer state, the step is made once without a measurement and once with each of

    certified           ours
    bisection           the paper's Algorithms 1 and 2 on our line
    the paper's way     clones of the parameters, the optimizer's step anew for every probe, L(θ)
                        again, and bisection (virtual_step.py)

every search from where the last one of its own way ended. Reported is what a measurement takes
beyond the step, in seconds, in plain forward-only passes timed at the same steps, and as a multiple
of what certified takes.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import ranks
from benchmarks.gpt import Size, Training
from benchmarks.results import between, markdown, spread
from benchmarks.virtual_step import critical_lr
from megatron_sharpness.pytorch import CriticalSharpness

SIZE = Size(layers=4, width=256, sequence=128, batch=8, micro_batches=2)
FIRST, LAST, EVERY = 20, 220, 10
OURS = ("certified", "bisection")
PAPERS = "the paper's way"


class Step:
    """The coming optimizer step, made as often as one likes from the same state."""

    def __init__(self, training: Training) -> None:
        self.training = training
        training.backward()
        self._weights = [p.detach().clone() for p in training.model.parameters()]
        self._optimizer = copy.deepcopy(training.optimizer.state_dict())

    @contextlib.contextmanager
    def again(self, seconds: list[float]) -> Iterator[None]:
        """From before the step, with its gradients; how long it takes is added to ``seconds``."""
        with torch.no_grad():
            parameters = self.training.model.parameters()
            for parameter, weights in zip(parameters, self._weights, strict=True):
                parameter.copy_(weights)
        # load_state_dict keeps the tensors that it is given, and a step changes them
        self.training.optimizer.load_state_dict(copy.deepcopy(self._optimizer))
        start = time.perf_counter()
        yield
        seconds.append(time.perf_counter() - start)


def run() -> dict[str, Any]:
    torch.set_num_threads(1)
    # There is no dropout whose masks the repeated step would have to see.
    warnings.filterwarnings("ignore", "critical sharpness: the model given was not called")
    training = Training(SIZE)
    states: dict[str, dict[str, Any]] = {}
    guess = 1e-3
    seconds: dict[str, list[float]] = {way: [] for way in ("pass", "step", *OURS, PAPERS)}
    passes: dict[str, list[int]] = {way: [] for way in (*OURS, PAPERS)}
    found: dict[str, list[float | None]] = {way: [] for way in (*OURS, PAPERS)}
    for number in range(1, LAST + 1):
        if number < FIRST or number % EVERY:
            training.step()
            continue
        print(f"measurement: step {number} of {LAST}", file=sys.stderr, flush=True)
        step = Step(training)
        seconds["pass"].append(ranks.clock(training.evaluate))
        with step.again(seconds[PAPERS]):
            search = critical_lr(training.optimizer, lambda: training.mean_loss, guess)
            training.optimizer.step()
        guess = search.eta or guess
        passes[PAPERS].append(search.evaluations + 1)  # and L(θ)
        found[PAPERS].append(search.eta)
        for way in OURS:
            sharpness = CriticalSharpness(training.model, training.optimizer, 1, method=way)
            sharpness.load_state_dict(states.get(way, {}))
            with step.again(seconds[way]):
                training.optimizer.step()
                record = sharpness.after_step(number, training.evaluate, loss=training.trained)
            assert record is not None and record.critical_lr is not None, record
            states[way] = sharpness.state_dict()
            sharpness.close()
            passes[way].append(record.evaluations)
            found[way].append(record.critical_lr)
        with step.again(seconds["step"]):
            training.optimizer.step()
    return {
        "settings": {**asdict(SIZE), "first": FIRST, "last": LAST, "every": EVERY},
        "results": {
            way: {"seconds": spread(values)}
            | (
                {
                    "beyond the step": spread(
                        a - b for a, b in zip(values, seconds["step"], strict=True)
                    ),
                    "in plain passes": spread(
                        (a - b) / c
                        for a, b, c in zip(values, seconds["step"], seconds["pass"], strict=True)
                    ),
                    "of certified": spread(
                        (a - b) / (c - b)
                        for a, b, c in zip(
                            values, seconds["step"], seconds["certified"], strict=True
                        )
                    ),
                    "passes": passes[way],
                    "found": found[way],
                }
                if way in passes
                else {}
            )
            for way, values in seconds.items()
        },
    }


def table(document: dict[str, Any]) -> str:
    results = document["results"]
    return markdown(
        ("way", "passes, mean", "seconds", "in plain passes", "÷ certified"),
        (
            (
                way,
                f"{statistics.fmean(results[way]['passes']):.1f}",
                between(results[way]["beyond the step"]),
                between(results[way]["in plain passes"], ".1f"),
                between(results[way]["of certified"]),
            )
            for way in (*OURS, PAPERS)
        ),
    )
