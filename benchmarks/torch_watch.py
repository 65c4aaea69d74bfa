"""A training in PyTorch, whose iterations and watch are timed."""

from __future__ import annotations

import os

from benchmarks import ranks
from benchmarks.gpt import Size, Training
from megatron_sharpness.core.watch import Watch


def main() -> None:
    training = Training(Size(width=256, layers=2, micro_batches=4))
    iterations = [ranks.clock(training.step) for _ in range(6)][1:]
    roots = {"model": training.model, "optimizer": training.optimizer}
    looks = [
        ranks.clock(lambda: Watch(lambda: roots))
        for _ in range(int(os.environ["BENCHMARK_REPETITIONS"]))
    ]
    values, size = Watch(lambda: roots).size
    ranks.write({"iterations": iterations, "looks": looks, "values": values, "bytes": size})


if __name__ == "__main__":
    main()
