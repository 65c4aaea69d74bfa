"""One rank of an FSDP2 training whose measurement only times its pieces, in turns with plain
forward-only passes."""

from __future__ import annotations

import os

import torch.distributed as dist

from benchmarks import ranks
from benchmarks.gpt import DEVICE, Size, Training
from megatron_sharpness.core.replay import RandomStates, reduce_loss
from megatron_sharpness.pytorch.optimizer import ModelOnLines
from megatron_sharpness.pytorch.step import ObservedStep

FRACTION = 1.5


def main() -> None:
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    training = Training(Size(sequence=512, micro_batches=4), sharded=True)
    training.step()
    observed = ObservedStep(training.model, [training.optimizer], keep={}, offload=False)
    training.step()
    lines = ModelOnLines(training.model, observed._optimizers)
    states = RandomStates()

    def plain() -> None:
        lines.sync()  # the root keeps its weights after a pass without gradients
        float(training.evaluate()[0])

    replaying = observed.replaying(
        training.evaluate, {}, eval_mode=False, frozen=False, watched=False
    )
    with replaying as (loss_at, _):
        seconds = ranks.alternate(
            {
                "plain": plain,
                "probe": lambda: loss_at(FRACTION),
                "write": lambda: lines.move(FRACTION),
                "states": states.restore,
                "reduce": lambda: reduce_loss(1.0, 1.0, None, DEVICE),
            },
            int(os.environ["BENCHMARK_REPETITIONS"]),
        )
    shards = [shard for seen in observed._optimizers for shard in seen._line.shards]
    written = sum(shard.main.nbytes * 2 + shard.model.nbytes for shard in shards)
    ranks.write(
        {
            "seconds": seconds,
            "written": written,
            "gathered": 0,
            "copy": ranks.copy_bandwidth(written, DEVICE),
            "gather": 0.0,
            "parameters": sum(shard.main.numel() for shard in shards),
        }
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
