"""A training script under ``python -m megatron_sharpness.megatron``: launch/pretrain_gpt.py, whose
iterations and watch are timed."""

from __future__ import annotations

import os
import runpy
from typing import Any

from megatron.training import training

from benchmarks import ranks
from benchmarks.results import ROOT
from megatron_sharpness.megatron.step import ObservedStep

iterations: list[float] = []
watch = ObservedStep.watch


def timed_watch(observed: ObservedStep) -> Any:
    looks = [
        ranks.clock(lambda: watch(observed))
        for _ in range(int(os.environ["BENCHMARK_REPETITIONS"]))
    ]
    made = watch(observed)
    assert made is not None
    values, size = made.size
    ranks.write(
        {"iterations": iterations[1:], "looks": looks, "values": values, "bytes": size}
    )
    return made


if __name__ == "__main__":
    training.train_step = ranks.timed(training.train_step, iterations)
    ObservedStep.watch = timed_watch  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "launch" / "pretrain_gpt.py"), run_name="__main__")
