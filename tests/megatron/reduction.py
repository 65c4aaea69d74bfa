"""Reduces made-up losses on a real Megatron layout and writes what every rank got; no training.

``LAYOUT`` holds the keywords of ``mpu.initialize_model_parallel``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_sharpness.megatron import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import mpu  # noqa: E402

from megatron_sharpness.core.errors import ProbeError  # noqa: E402
from megatron_sharpness.megatron.replay import Loss, RecordingSchedule  # noqa: E402

dist.init_process_group("gloo")
mpu.initialize_model_parallel(**json.loads(os.environ["LAYOUT"]))
rank = dist.get_rank()
# Two micro-batches; every rank has its own sums, as data- and context-parallel ranks do.
sums = [Loss(torch.tensor(10.0 + rank), torch.tensor(4)),
        Loss(torch.tensor(20.0 + rank), torch.tensor(6))]  # fmt: skip
means = [Loss(torch.tensor(2.0 + rank), None), Loss(torch.tensor([4.0 + rank]), None)]
schedule = RecordingSchedule(lambda: None, [])
schedule._kwargs = {"micro_batch_size": 3}
try:
    schedule.reduce(sums, ValueError("injected") if rank == 1 else None, per_token=True)
except ProbeError as caught:
    error = str(caught)
result = {
    "tokens alike": schedule.reduce(sums, None, per_token=True),
    "micro-batches alike": schedule.reduce(sums, None, per_token=False),
    "means": schedule.reduce(means, None, per_token=False),
    "error": error,
}
Path(os.environ["OBSERVED_OUT"], f"rank{rank}.json").write_text(json.dumps(result))
