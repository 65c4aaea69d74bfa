"""What the largest eigenvalue of the Hessian costs, beside critical sharpness.

A GPT in training, in one process of PyTorch, each of its steps measured twice: λ_c by the
certified search, and λ_max of Adam's pre-conditioned Hessian by Lanczos with Hessian-vector
products under math attention (``megatron_sharpness.reference``). Seconds, and the most memory that
it takes; at the end what a Hessian-vector product says under flash attention.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import ranks
from benchmarks.gpt import DEVICE, Size, Training
from benchmarks.peak import ENVIRONMENT, Peak
from benchmarks.results import between, markdown, spread
from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.reference import exact_curvature

SIZE = Size(layers=4, width=128, sequence=128, batch=8, micro_batches=1)
WARM = 30
LR = 1e-3


def run() -> dict[str, Any]:
    results = {}
    for what, environment in (("seconds", {}), ("memory", ENVIRONMENT)):
        print(f"hessian: {what}", file=sys.stderr, flush=True)
        results[what] = ranks.launch(["-m", "benchmarks.hessian", what], 1, environment)
    return {
        "settings": {**asdict(SIZE), "steps before": WARM, "steps": STEPS},
        "results": results,
    }


#: Measured steps of each process; the first, in which λ_c is tested against itself, is left out.
STEPS = {"seconds": 4, "memory": 2}


def main(what: str) -> None:
    """In a process of its own, as it takes another allocator to see the peak of memory."""
    training = Training(SIZE, lr=LR)
    for _ in range(WARM):
        training.step()
    parameters = list(training.model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    values: dict[str, list[float]] = {"λ_c": [], "λ_max": []}
    evaluations: dict[str, list[int]] = {"λ_c": [], "λ_max": []}

    def loss() -> torch.Tensor:
        evaluations["λ_max"][-1] += 1
        return training.mean_loss_with_graph()

    def take(name: str, function: Callable[[], Any]) -> Any:
        """Seconds, or peak bytes a parameter, of a function, and what it returns."""
        peak, start = Peak(DEVICE), time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
        values[name].append(seconds if what == "seconds" else peak.bytes() / count)
        return result

    sharpness = CriticalSharpness(training.model, training.optimizer, 1)
    for number in range(1, STEPS[what] + 1):
        start = [parameter.detach().clone() for parameter in parameters]
        training.step()
        record = take("λ_c", lambda n=number: sharpness.after_step(n, training.evaluate))
        evaluations["λ_c"].append(record.evaluations + 1)  # and L(θ)
        evaluations["λ_max"].append(0)
        take(
            "λ_max",
            lambda s=start: exact_curvature(
                training.model, training.optimizer, s, LR, loss, hessian=False
            ),
        )
    ratios = [b / a for a, b in zip(values["λ_c"], values["λ_max"], strict=True)]
    ranks.write(
        {
            "parameters": count,
            **{name: spread(entries[1:]) for name, entries in values.items()},
            "ratio": spread(ratios[1:]),
            "evaluations": {name: entries[1:] for name, entries in evaluations.items()},
            "under flash attention": _under_flash(training),
        }
    )


def _under_flash(training: Training) -> str:
    """What a Hessian-vector product raises under flash attention."""
    parameters = list(training.model.parameters())
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        gradient = torch.autograd.grad(
            training.mean_loss_with_graph(), parameters, create_graph=True
        )
        try:
            torch.autograd.grad(sum(g.sum() for g in gradient), parameters)
        except RuntimeError as error:
            return str(error).split("\n")[0]
    return "nothing"


def table(document: dict[str, Any]) -> str:
    seconds, memory = document["results"]["seconds"], document["results"]["memory"]
    rows = [
        (
            name,
            f"{statistics.fmean(seconds['evaluations'][name]):.0f} {kind}",
            between(seconds[name]),
            f"{memory[name][1]:.1f}",
        )
        for name, kind in (("λ_c", "forward passes"), ("λ_max", "Hessian-vector products"))
    ]
    rows.append(("λ_max ÷ λ_c", "", between(seconds["ratio"], ".0f"), f"{memory['ratio'][1]:.0f}"))
    return "\n\n".join(
        (
            markdown(("", "takes", "seconds", "peak memory, bytes a parameter"), rows),
            "Under flash attention a Hessian-vector product raises: "
            f"`{seconds['under flash attention']}`",
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
