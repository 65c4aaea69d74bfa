"""A training script under ``python -m megatron_sharpness.megatron``: launch/pretrain_gpt.py, which
writes down each iteration and the end, and lets go wrong what :mod:`benchmarks.endurance` plans."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import get_args, training

from benchmarks import ranks
from benchmarks.endurance import PLAN, SAMPLE, Plan
from benchmarks.results import ROOT
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.replay import RandomStates
from megatron_sharpness.megatron.replay import Loss, RecordingSchedule
from megatron_sharpness.sinks import JsonLinesSink
from tests.megatron.observed_pretrain import snapshot

RANK, LAST = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
STARTED_AGAIN = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
FOLDER = Path(os.environ[ranks.OUT])

log, train, build = (
    training.training_log, training.train, training.build_train_valid_test_data_iterators
)  # fmt: skip
replay, forward, write = RecordingSchedule.replay, TransformerLayer.forward, JsonLinesSink.write


class Mallinfo(ctypes.Structure):
    """What ``mallinfo2`` of glibc returns, summed over its arenas."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    )  # fmt: skip


mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo


def memory() -> dict[str, int]:
    """Of this process, without garbage: bytes that are resident, bytes that the allocator has in
    use, on a GPU or malloc's, and blocks that Python's own has."""
    gc.collect()
    found = mallinfo()
    on_device = torch.cuda.memory_allocated() if torch.accelerator.is_available() else None
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * resource.getpagesize(),
        "allocated": found.uordblks + found.hblkhd if on_device is None else on_device,
        "blocks": sys.getallocatedblocks(),
    }


def observed_log(
    losses: dict[str, Any], total: Any, rate: Any, iteration: int, *rest: Any, **kwargs: Any
) -> Any:
    result = log(losses, total, rate, iteration, *rest, **kwargs)
    row = {"process": os.getpid(), "iteration": iteration, "loss": float(losses["lm loss"])}
    used = memory() if iteration % int(os.environ[SAMPLE]) == 0 else {}
    with (FOLDER / f"rank{RANK}.jsonl").open("a") as file:
        file.write(json.dumps({**row, **used}) + "\n")
    return result


def observed_train(
    step: Any, model: Any, optimizer: Any, scheduler: Any, iterator: Any, *rest: Any, **kwargs: Any
) -> Any:
    result = train(step, model, optimizer, scheduler, iterator, *rest, **kwargs)
    end = snapshot(model, optimizer, scheduler, iterator)
    (FOLDER / f"end{RANK}.json").write_text(json.dumps(end))
    return result


def build_without_a_draw(*args: Any, **kwargs: Any) -> Any:
    """On the CPU a data loader draws from the random states of dropout, as none does on a GPU, and
    it is made anew where a run is resumed."""
    states = RandomStates()
    try:
        return build(*args, **kwargs)
    finally:
        states.restore()


class Faults:
    """What goes wrong in measurements."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.measured = 0  # the iteration whose first probe was seen
        self.raises = False

    def replay(self, schedule: RecordingSchedule) -> list[Loss]:
        """The first probe of each measurement, and the faults that are planned for it."""
        iteration = get_args().curr_iteration + 1
        first, self.measured = iteration != self.measured, iteration
        if first and iteration == self.plan.sigterm and RANK == 0:
            os.kill(os.getppid(), signal.SIGTERM)  # the launcher, as a cluster does
        if first and iteration == self.plan.kill and RANK == LAST and not STARTED_AGAIN:
            for helper in multiprocessing.active_children():
                helper.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        self.raises = first and iteration == self.plan.exception and RANK == LAST
        try:
            losses = replay(schedule)
        finally:
            self.raises = False
        if first and iteration == self.plan.nan and RANK == LAST:
            return [dataclasses.replace(each, loss=each.loss * torch.nan) for each in losses]
        return losses

    def forward(self, layer: TransformerLayer, *args: Any, **kwargs: Any) -> Any:
        """Raises between two layers, when a pass has drawn a part of its random numbers."""
        if self.raises and layer.layer_number == 2:
            raise RuntimeError("injected")
        return forward(layer, *args, **kwargs)

    def write(self, sink: JsonLinesSink, record: Measurement) -> None:
        """The log's disk is full for some iterations, from the middle of a line on."""
        kept = sink.path.with_suffix(".kept")
        if record.iteration == self.plan.full:
            with sink.path.open("a") as file:
                file.write(record.to_json()[:100])
            sink.path.rename(kept)
            sink.path.symlink_to("/dev/full")
        if record.iteration == self.plan.freed:
            kept.rename(sink.path)
        write(sink, record)


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


if __name__ == "__main__":
    training.training_log, training.train = observed_log, observed_train
    training.build_train_valid_test_data_iterators = build_without_a_draw
    if PLAN in os.environ:
        faults = Faults(Plan(**json.loads(os.environ[PLAN])))
        for owner, method in (
            (RecordingSchedule, faults.replay), (TransformerLayer, faults.forward),
            (JsonLinesSink, faults.write),
        ):  # fmt: skip
            setattr(owner, method.__name__, _as_method(method))
    runpy.run_path(str(ROOT / "launch" / "pretrain_gpt.py"), run_name="__main__")
