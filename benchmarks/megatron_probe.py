"""A training script under ``python -m megatron_sharpness.megatron``: launch/pretrain_gpt.py, whose
measurement only times its pieces, in turns with plain forward-only passes."""

from __future__ import annotations

import os
import runpy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu

from benchmarks import ranks
from benchmarks.results import ROOT
from megatron_sharpness.megatron.replay import current_device
from megatron_sharpness.megatron.step import ObservedStep


def measure(
    observed: ObservedStep,
    meter: Any,
    schedule: Any,
    *,
    iteration: int,
    consumed_samples: int,
    trained: bool,
    **_: Any,
) -> dict[str, Any]:
    """In place of :meth:`ObservedStep.measure`."""
    observed._agree(iteration, consumed_samples, schedule, trained)
    restore, losses = schedule._restore, schedule.losses
    reduce = partial(schedule.reduce, per_token=schedule.per_token)

    def plain() -> None:
        schedule._restore = lambda: None
        passed = schedule.replay()
        schedule._restore = restore
        for entry in passed:
            float(entry.loss)

    line = observed.line
    fraction = 1.5
    seconds = ranks.alternate(
        {
            "plain": plain,
            "probe": lambda: observed._probe(fraction, [schedule.replay], reduce),
            "write": lambda: line.move(fraction),
            "gather": line.gathers.sync,
            "states": restore,
            "reduce": lambda: reduce(losses, None),
        },
        int(os.environ["BENCHMARK_REPETITIONS"]),
    )
    shards = [shard for entry, _ in line.lines for shard in entry.shards]
    written = sum(
        shard.main.nbytes * 2 + shard.model.nbytes for shard in shards
    )  # θ_t and θ_{t+1} are read, the model is written
    gathered = sum(
        buffer.param_data.nbytes
        for chunk in line.model
        if hasattr(chunk, "bucket_groups")  # FSDP gathers in its passes
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    )
    line.restore()
    ranks.write(
        {
            "seconds": seconds,
            "written": written,
            "gathered": gathered if mpu.get_data_parallel_world_size() > 1 else 0,
            "copy": ranks.copy_bandwidth(written, current_device()),
            "gather": gather_bandwidth(gathered),
            "parameters": sum(shard.main.numel() for shard in shards),
        }
    )
    return {}


def gather_bandwidth(size: int) -> float:
    """Bytes a second that one all-gather of ``size`` bytes over the data-parallel ranks brings.

    In place, as Megatron gathers.
    """
    group = mpu.get_data_parallel_group()
    if not size or group.size() == 1:
        return 0.0
    whole = torch.zeros(
        size // group.size() * group.size(), dtype=torch.uint8, device=current_device()
    )
    part = whole.chunk(group.size())[group.rank()]
    seconds = ranks.alternate(
        {"gather": lambda: dist.all_gather_into_tensor(whole, part, group=group)}, 5
    )["gather"]
    return whole.nbytes / sorted(seconds)[2]


if __name__ == "__main__":
    ObservedStep.measure = measure  # type: ignore[assignment, method-assign]
    runpy.run_path(str(ROOT / "launch" / "pretrain_gpt.py"), run_name="__main__")
