"""One process of a PyTorch training whose third step is measured in the way named.

It writes the peak bytes from the optimizer's step to the end of the measurement, less those of a
forward pass alone, and the parameters that this rank owns.
"""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

from benchmarks import ranks
from benchmarks.gpt import DEVICE, Size, Training
from benchmarks.peak import Peak
from benchmarks.virtual_step import critical_lr
from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.pytorch.shards import local

#: 57 million parameters, and as little activation as can be.
SIZE = Size(layers=2, width=1536, sequence=16, batch=1, micro_batches=1)


def main(way: str) -> None:
    sharded = int(os.environ["WORLD_SIZE"]) > 1
    if sharded:
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    training = Training(SIZE, sharded=sharded)
    for _ in range(2):  # the optimizer allocates its state
        training.step()
    if way == "virtual":
        training.backward()
        peak = Peak(DEVICE)
        critical_lr(training.optimizer, lambda: training.mean_loss, 1e-3)
    else:
        peaks: list[Peak] = []
        training.optimizer.register_step_pre_hook(lambda *_: peaks.append(Peak(DEVICE)))
        sharpness = CriticalSharpness(training.model, training.optimizer, 1, offload=way)
        training.step()
        record = sharpness.after_step(1, training.evaluate)
        assert record is not None and record.status == "found", record
        (peak,) = peaks
    measured = peak.bytes()
    forward = Peak(DEVICE)
    training.evaluate()
    parameters = sum(local(p).numel() for p in training.model.parameters())
    ranks.write({"bytes": measured - forward.bytes(), "parameters": parameters})
    if sharded:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
