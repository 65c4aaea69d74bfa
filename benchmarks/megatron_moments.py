"""A training script under ``python -m megatron_sharpness.megatron``: launch/pretrain_gpt.py, whose
iterations and signal-to-noise ratios of second moments are timed."""

from __future__ import annotations

import os
import runpy
from typing import Any

from megatron.training import training

from benchmarks import ranks
from benchmarks.results import ROOT
from megatron_sharpness.core.meter import Meter

iterations: list[float] = []
measure = Meter.with_second_moments


def timed_measure(meter: Meter, step: Any, sources: Any, device: Any) -> Any:
    values = [piece.read() for source in sources() for piece in source.pieces()]
    repetitions = range(int(os.environ["BENCHMARK_REPETITIONS"]))
    result = measure(meter, step, sources, device)  # which learns what there is
    ranks.write(
        {
            "iterations": iterations[1:],
            "measured": [
                ranks.clock(lambda: measure(meter, step, sources, device)) for _ in repetitions
            ],
            "reads": [ranks.clock(lambda: [value.sum() for value in values]) for _ in repetitions],
            "moments": sum(value.numel() for value in values),
        }
    )
    return result


if __name__ == "__main__":
    training.train_step = ranks.timed(training.train_step, iterations)
    Meter.with_second_moments = timed_measure  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "launch" / "pretrain_gpt.py"), run_name="__main__")
