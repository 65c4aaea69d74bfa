"""What torchtitan 0.3 lacks on a CPU, and no sleep. Import it before torchtitan."""

from __future__ import annotations

import collections
import time
from types import SimpleNamespace
from typing import Any

import torch

# torchtitan reads the device type when it is imported, and takes "cuda" where there is no
# accelerator; and it asks for the memory of the device.
torch._utils._get_available_device_type = lambda: "cpu"
_missing: dict[str, Any] = {
    "get_device_name": lambda *_: "cpu",
    "get_device_properties": lambda *_: SimpleNamespace(total_memory=2**30),
    "memory_stats": lambda *_: collections.defaultdict(int),
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
}
for _name, _function in _missing.items():
    if not hasattr(torch.cpu, _name):
        setattr(torch.cpu, _name, _function)

import torchtitan.distributed.utils as dist_utils  # noqa: E402
import torchtitan.trainer as trainer  # noqa: E402

dist_utils.set_pg_timeouts = lambda *_, **__: None  # its barrier names a device by number
trainer.time = SimpleNamespace(sleep=lambda _: None, perf_counter=time.perf_counter)
