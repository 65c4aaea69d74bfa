"""Reduces made-up losses on a real Megatron layout and writes what every rank got; no training.

``LAYOUT`` holds the keywords of ``mpu.initialize_model_parallel``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_sharpness.megatron import cpu_backend

cpu_backend.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import mpu  # noqa: E402

from megatron_sharpness.megatron.replay import reduce_losses  # noqa: E402
from megatron_sharpness.meter import ProbeError  # noqa: E402

dist.init_process_group("gloo")
mpu.initialize_model_parallel(**json.loads(os.environ["LAYOUT"]))
rank = dist.get_rank()
# Two micro-batches; every rank has its own sums, as data- and context-parallel ranks do.
sums = [
    {"lm loss": torch.tensor([10.0 + rank, 4.0])},
    {"lm loss": torch.tensor([20.0 + rank, 6.0]), "other": torch.tensor([1.0, 1.0])},
]
means = [{"lm loss": torch.tensor(2.0 + rank)}, {"lm loss": torch.tensor([4.0 + rank])}]
try:
    reduce_losses(sums, ValueError("injected") if rank == 1 else None)
except ProbeError as caught:
    error = str(caught)
result = {"sums": reduce_losses(sums, None), "means": reduce_losses(means, None), "error": error}
Path(os.environ["OBSERVED_OUT"], f"rank{rank}.json").write_text(json.dumps(result))
