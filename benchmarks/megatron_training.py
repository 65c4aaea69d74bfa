"""A training script under ``python -m megatron_sharpness.megatron``: launch/pretrain_gpt.py, which
writes when each iteration was over and what the measurements took."""

from __future__ import annotations

import runpy
import time
from typing import Any

from megatron.training import training

from benchmarks import ranks
from benchmarks.results import ROOT
from megatron_sharpness.core.measurement import TRAIN, Measurement
from megatron_sharpness.megatron.step import ObservedStep

over: list[float] = []
measured: list[tuple[float, int]] = []
log, measure = training.training_log, ObservedStep.measure


def observed_log(*args: Any, **kwargs: Any) -> Any:
    result = log(*args, **kwargs)
    over.append(time.perf_counter())
    return result


def observed_measure(step: ObservedStep, *args: Any, **kwargs: Any) -> dict[str, Measurement]:
    start = time.perf_counter()
    records = measure(step, *args, **kwargs)
    measured.append((time.perf_counter() - start, records[TRAIN].evaluations or 0))
    return records


if __name__ == "__main__":
    training.training_log = observed_log
    ObservedStep.measure = observed_measure  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "launch" / "pretrain_gpt.py"), run_name="__main__")
    ranks.write({"over": over, "measured": measured})
