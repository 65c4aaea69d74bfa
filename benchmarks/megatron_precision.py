"""A training script under ``python -m megatron_sharpness.megatron``: launch/pretrain_gpt.py, on
weights that are given and with a learning rate a step, or which gives the weights that it trained.

``PRECISION_WEIGHTS`` names the file; ``PRECISION_RATES`` the learning rates of the steps, one after
the other, as JSON. Without rates the weights are trained and written.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import training

from benchmarks import ranks
from benchmarks.results import ROOT
from megatron_sharpness.core.meter import Meter
from megatron_sharpness.megatron.step import ObservedStep

WEIGHTS = Path(os.environ["PRECISION_WEIGHTS"])
RATES: list[float] = json.loads(os.environ.get("PRECISION_RATES", "[]"))

setup, measure = training.setup_model_and_optimizer, ObservedStep.measure
records: list[dict[str, Any]] = []
trained: dict[str, torch.Tensor] = {}
model: list[Any] = []


def observed_setup(*args: Any, **kwargs: Any) -> Any:
    built, optimizer, scheduler = setup(*args, **kwargs)
    model.extend(built)
    if RATES:
        weights = torch.load(WEIGHTS)
        for name, parameter in named(built):
            with torch.no_grad():
                parameter.copy_(weights[name])
                # The fp32 main parameter has all bits, which training would have given it.
                getattr(parameter, "main_param", parameter).copy_(weights[name])
    return built, optimizer, scheduler


def observed_measure(
    step: ObservedStep, meter: Meter, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    meter.load_state_dict({})  # each search begins cold, at the learning rate
    found = measure(step, meter, *args, **kwargs)
    records.extend(json.loads(record.to_json()) for record in found.values())
    return found


def rate(scheduler: OptimizerParamScheduler, group: dict[str, Any]) -> float:
    step = min(scheduler.num_steps // scheduler.batch_size, len(RATES) - 1)
    return RATES[step]


def named(built: list[Any]) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (name.replace("module.", ""), parameter)
        for chunk in built
        for name, parameter in chunk.named_parameters()
    ]


if __name__ == "__main__":
    training.setup_model_and_optimizer = observed_setup
    ObservedStep.measure = observed_measure  # type: ignore[method-assign]
    if RATES:
        OptimizerParamScheduler.batch_size = int(os.environ["PRECISION_BATCH"])  # type: ignore[attr-defined]
        OptimizerParamScheduler.get_lr = rate  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "launch" / "pretrain_gpt.py"), run_name="__main__")
    if not RATES:
        torch.save({name: p.detach().float() for name, p in named(model)}, WEIGHTS)
    ranks.write(records)
