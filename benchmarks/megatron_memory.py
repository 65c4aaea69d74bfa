"""A training script under ``python -m megatron_sharpness.megatron``: launch/pretrain_gpt.py.

It writes the peak bytes from the optimizer's step to the end of its measurement, less those of an
earlier step that a forward pass alone follows, as in training, and the parameters that rank 0 owns.
"""

from __future__ import annotations

import runpy
from typing import Any

from benchmarks import ranks
from benchmarks.peak import Peak
from benchmarks.results import ROOT
from megatron_sharpness.core.measurement import TRAIN, Records
from megatron_sharpness.megatron.step import ObservedStep

#: The optimizer has allocated its state at the second step; the third is measured.
MEASURED = 3

peaks: list[Peak] = []
alone: list[int] = []
before, measure = ObservedStep._before, ObservedStep.measure


def observed_before(step: ObservedStep) -> None:
    parameter = next(step.line.model[0].module.parameters())
    peaks.append(Peak(parameter.device))  # Megatron's backend for the CPU says that CUDA is there
    if len(peaks) == MEASURED:
        before(step)


def observed_measure(step: ObservedStep, meter: Any, schedule: Any, **kwargs: Any) -> Records:
    if len(peaks) < MEASURED:
        step.line.gathers.settle()
        step.line.gathers.sync()
        schedule.replay()
        step.line.gathers.finish()
        alone.append(peaks[-1].bytes())
        step.line.gathers.end()
        return Records(())
    owned = sum(shard.main.numel() for line, _ in step.line.lines for shard in line.shards)
    records = measure(step, meter, schedule, **kwargs)
    assert records[TRAIN].status == "found", records
    ranks.write({"bytes": peaks[-1].bytes() - alone[-1], "parameters": owned})
    return records


if __name__ == "__main__":
    ObservedStep._before = observed_before  # type: ignore[method-assign]
    ObservedStep.measure = observed_measure  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "launch" / "pretrain_gpt.py"), run_name="__main__")
