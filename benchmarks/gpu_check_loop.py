"""A loop of one's own, FSDP2 with ``torch.compile``, verified; under torchrun.

``python -m benchmarks.gpu_check_loop FOLDER LAYERS WIDTH SEQUENCE STEPS``
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpt import DEVICE, Size, Training
from megatron_sharpness.verify.loop import verify


def main(folder: str, layers: int, width: int, sequence: int, steps: int) -> int:
    """Verify it, and return the exit status."""
    size = Size(layers=layers, width=width, sequence=sequence)

    def train(sharpness: Any) -> None:
        training = Training(size, sharded=True)
        for block in training.model.blocks:
            block.compile()
        measured = sharpness(training.model, training.optimizer)
        for step in range(steps):
            training.step()
            measured.after_step(step, training.evaluate, loss=training.trained)

    found = verify(train, steps, every=4, out=folder)
    if dist.get_rank() == 0:
        print(found)
    return found.status


if __name__ == "__main__":
    on_gpu = DEVICE.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.use_deterministic_algorithms(True, warn_only=True)
    flash = sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if on_gpu else contextlib.nullcontext()
    with flash:
        status = main(sys.argv[1], *map(int, sys.argv[2:]))
    dist.destroy_process_group()
    sys.exit(status)
