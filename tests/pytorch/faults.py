"""Trains with a fault in the first measurement, as one rank of several."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_sharpness.core.update_line import UpdateLine
from megatron_sharpness.pytorch.losses import Evaluate

from .layouts import DISTRIBUTED
from .training import EVERY, STEPS, train

LAYOUTS = ("ddp", "fsdp2", "fsdp2, never resharded", "zero")


def on_one_rank(model: nn.Module, evaluate: Evaluate) -> Evaluate:
    """The third evaluation fails on rank 1, after its forward passes."""
    calls = 0

    def failing() -> Any:
        nonlocal calls
        calls += 1
        result = evaluate()
        if calls == 3 and dist.get_rank() == 1:
            raise RuntimeError("a fault on one rank")
        return result

    return failing


def inside_the_model(model: nn.Module, evaluate: Evaluate) -> Evaluate:
    """The second evaluation fails on all ranks in the midst of the forward pass."""
    calls = 0

    def fail(*_: Any) -> None:
        raise RuntimeError("a fault inside the model")

    def failing() -> Any:
        nonlocal calls
        calls += 1
        handle = model.blocks[1].up.register_forward_pre_hook(fail) if calls == 2 else None
        try:
            return evaluate()
        finally:
            if handle is not None:
                handle.remove()

    return failing


def no_memory_on_one_rank(model: nn.Module, evaluate: Evaluate) -> Evaluate:
    """The snapshot before the first step has failed on rank 1, see :func:`main`."""
    return evaluate


FAULTS: dict[str, Callable[[nn.Module, Evaluate], Evaluate]] = {
    "a fault on one rank": on_one_rank,
    "a fault inside the model": inside_the_model,
    "no memory for the copy": no_memory_on_one_rank,
}


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    begin, found = UpdateLine.begin, {}

    def begin_without_memory(line: UpdateLine) -> None:
        UpdateLine.begin = begin  # type: ignore[method-assign]
        raise torch.OutOfMemoryError("no memory for the copy")

    for layout in LAYOUTS:
        off = train(DISTRIBUTED[layout], STEPS, every=0, dropout=0.2)
        for fault, disturb in FAULTS.items():
            if fault == "no memory for the copy" and dist.get_rank() == 1:
                UpdateLine.begin = begin_without_memory  # type: ignore[method-assign]
            on = train(DISTRIBUTED[layout], STEPS, every=EVERY, dropout=0.2, disturb=disturb)
            found[f"{layout}: {fault}"] = {
                "equal": {name: on.hashes[name] == off.hashes[name] for name in off.hashes},
                "records": on.records,
            }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
