"""A training script under ``python -m megatron_sharpness.megatron``: launch/pretrain_gpt.py, in
which a measurement times whole measurements, their parts and the bandwidths that they depend on,
in turns with forward-only passes."""

from __future__ import annotations

import os
import runpy
from functools import partial
from typing import Any

from benchmarks import ranks
from benchmarks.megatron_probe import gather_bandwidth
from benchmarks.results import ROOT
from megatron_sharpness.megatron.replay import current_device
from megatron_sharpness.megatron.step import ObservedStep

PASSES = int(os.environ["BENCHMARK_PASSES"])
FRACTION = 1.5
COPIED = 2**27  # bytes, which no cache holds

measure_step = ObservedStep.measure


class Probes:
    """In place of a meter: a search of :data:`PASSES` forward passes."""

    def measure(self, step: Any, loss_at: Any, *_: Any) -> None:
        for _ in range(PASSES):
            loss_at(FRACTION * step.lr)


def measure(observed: ObservedStep, meter: Any, schedule: Any, **options: Any) -> dict[str, Any]:
    """In place of :meth:`ObservedStep.measure`."""

    def whole() -> None:
        observed._before()
        measure_step(observed, Probes(), schedule, **options)  # type: ignore[arg-type]

    def products() -> None:
        observed._agree(options["iteration"], options["consumed_samples"], schedule, True)

    line = observed.line
    reduce = partial(schedule.reduce, per_token=schedule.per_token)
    line.begin()
    owned = sum(shard.main.numel() for entry, _ in line.lines for shard in entry.shards)
    buffers = [buffer for chunk in line.model for buffer in chunk.buffers]
    gathered = sum(buffer.param_data.nbytes for buffer in buffers)
    copies: list[float] = []
    gathers: list[float] = []
    seconds = ranks.alternate(
        {  # in the order in which they come
            "forward": schedule.replay,
            "measurement": whole,
            "copies": lambda: copies.append(ranks.copy_bandwidth(COPIED, current_device())),
            "gathers": lambda: gathers.append(gather_bandwidth(gathered)),
            "snapshot": observed._before,
            "products": products,
            "probe": lambda: observed._probe(FRACTION, [schedule.replay], reduce),
            "write": lambda: line.move(FRACTION),
            "gather": line.gathers.sync,
            "restore": line.restore,
        },
        int(os.environ["BENCHMARK_REPETITIONS"]),
    )
    del seconds["copies"], seconds["gathers"]
    ranks.write({"seconds": seconds, "owned": owned, "copy": copies[1:], "gather": gathers[1:]})
    return {}


if __name__ == "__main__":
    ObservedStep.measure = measure  # type: ignore[assignment, method-assign]
    runpy.run_path(str(ROOT / "launch" / "pretrain_gpt.py"), run_name="__main__")
