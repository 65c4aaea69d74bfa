"""A training script under ``python -m megatron_sharpness.megatron``: launch/pretrain_gpt.py.

It writes the peak bytes from the optimizer's step to the end of the measurement, less those of one
gather of the parameters alone, which every training step makes, and the parameters that rank 0
owns.
"""

from __future__ import annotations

import runpy
from typing import Any

from benchmarks import ranks
from benchmarks.peak import Peak
from benchmarks.results import ROOT
from megatron_sharpness.core.measurement import TRAIN
from megatron_sharpness.megatron.step import ObservedStep

peaks: list[Peak] = []
before, measure = ObservedStep._before, ObservedStep.measure


def observed_before(step: ObservedStep) -> None:
    parameter = next(step.line.model[0].module.parameters())
    peaks.append(Peak(parameter.device))  # Megatron's backend for the CPU says that CUDA is there
    before(step)


def observed_measure(step: ObservedStep, *args: Any, **kwargs: Any) -> Any:
    owned = sum(shard.main.numel() for line, _ in step.line.lines for shard in line.shards)
    records = measure(step, *args, **kwargs)
    assert records[TRAIN].status == "found", records
    measured = peaks[-1].bytes()
    gather = Peak(peaks[-1].device)
    for chunk in step.line.model:
        if not hasattr(chunk, "process_group"):  # FSDP2 gathers in its passes alone
            chunk.start_param_sync(force_sync=True)
    ranks.write({"bytes": measured - gather.bytes(), "parameters": owned})
    return records


if __name__ == "__main__":
    ObservedStep._before = observed_before  # type: ignore[method-assign]
    ObservedStep.measure = observed_measure  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "launch" / "pretrain_gpt.py"), run_name="__main__")
