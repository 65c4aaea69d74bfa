"""Faults that a measurement must survive, injected into a run by ``OBSERVED_FAULT``."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import get_args

from megatron_sharpness.core import update_line
from megatron_sharpness.megatron import engine, graphs, quiet, replay, states
from megatron_sharpness.megatron.shards.gathers import AllGathers

RANK = int(os.environ["RANK"])
LAST = int(os.environ["WORLD_SIZE"]) - 1


SECOND = 4  # the iteration of the second measurement


def _once(fault: Callable[[], None], owner: type, name: str, *, after: bool = False) -> None:
    """Let the second call of a method in iteration ``SECOND`` do ``fault`` too."""
    function, calls = getattr(owner, name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += get_args().curr_iteration + 1 == SECOND
        now = calls == CALL.get(name, 2) and get_args().curr_iteration + 1 == SECOND
        if now and not after:
            calls += 1
            fault()
        result = function(*args, **kwargs)
        if now and after:
            calls += 1
            fault()
        return result

    setattr(owner, name, faulty)


def _once_in(function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """``function``, which fails in iteration ``SECOND``."""

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if get_args().curr_iteration + 1 == SECOND:
            raise error
        return function(*args, **kwargs)

    return faulty


#: Which call of a method is hit where it is not the second: one snapshot is taken a measurement,
#: and the training step has called two layers twice.
CALL = {"begin": 1, "forward": 6, "micro_batches": 1}


def _raise(error: Exception) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


def exception_on_last_rank() -> None:
    """Before the forward pass of a probe."""
    if RANK == LAST:
        _once(_raise(RuntimeError("injected")), replay.RecordingSchedule, "replay")


def exception_in_evaluation_on_last_rank() -> None:
    """While other data is made ready for the model, which may wait for other ranks then."""
    if RANK == LAST:
        _once(_raise(RuntimeError("injected")), replay.RecordingSchedule, "micro_batches")


def exception_in_forward() -> None:
    """In the second layer of a probe, on all ranks."""
    _once(_raise(RuntimeError("injected")), TransformerLayer, "forward")


def exception_in_forward_on_last_rank() -> None:
    """In the second layer of a probe, while other ranks gather the rest of the parameters."""
    if RANK == LAST:
        _once(_raise(RuntimeError("injected")), TransformerLayer, "forward")


def exception_after_forward_on_last_rank() -> None:
    """After the forward pass, where model-parallel peers no longer wait for this rank."""
    if RANK == LAST:
        _once(_raise(RuntimeError("injected")), replay.RecordingSchedule, "replay", after=True)


def out_of_memory_in_snapshot() -> None:
    """On one rank, when θ_t is kept."""
    if RANK == 0:
        _once(_raise(torch.OutOfMemoryError("injected")), update_line.UpdateLine, "begin")


def out_of_memory_in_kept_state() -> None:
    """On one rank, when what the model keeps beside its parameters is copied for the end."""
    if RANK == 0:
        quiet.state_of = _once_in(quiet.state_of, torch.OutOfMemoryError("injected"))


def out_of_memory_in_move() -> None:
    """On one rank, while a probe's weights are written."""
    if RANK == 0:
        _once(_raise(torch.OutOfMemoryError("injected")), update_line.UpdateLine, "move")


def sigterm_during_probe() -> None:
    """The cluster ends the job."""
    _once(lambda: os.kill(os.getpid(), signal.SIGTERM), replay.RecordingSchedule, "replay")


def death_of_last_rank() -> None:
    """The process is gone, as on a lost node."""
    if RANK == LAST:
        _once(lambda: os._exit(17), replay.RecordingSchedule, "replay")


def non_repeating_loss() -> None:
    """A forward pass that answers differently every time, on the same weights."""
    real, calls = replay.reduce_losses, 0

    def noisy(*args: Any, **kwargs: Any) -> tuple[float, int]:
        nonlocal calls
        calls += 1
        loss, tokens = real(*args, **kwargs)
        return loss + (1e-4 if calls % 2 else 0.0), tokens

    replay.reduce_losses = noisy


def stale_weights() -> None:
    """Probes do not have the weights that they wrote gathered."""
    AllGathers.sync = lambda self: None  # type: ignore[method-assign]


def fused_adam() -> None:
    """No fault: the Adam of Transformer Engine, also where it need not be aware of precision."""
    from megatron_sharpness.megatron.cpu.fused_adam import use_fused_adam

    use_fused_adam()


def canonical() -> None:
    """No fault: weights that do not depend on the parallel layout."""
    from tests.megatron import canonical as weights

    weights.install()


def scales_that_stay() -> None:
    """Delayed scales do not move in a replay."""
    engine.Scales.repeated = lambda self: contextlib.nullcontext()  # type: ignore[method-assign]


def quantization_that_is_not_put_back() -> None:
    """What Transformer Engine's objects hold is not looked into."""
    engine.quantizes = lambda model: False


def probes_by_graphs() -> None:
    """Probes go through the graphs of training."""
    graphs.by_kernels = lambda schedule: schedule
    graphs.switches = lambda model: []


def weights_held_elsewhere() -> None:
    """What is put back before each pass holds views of the weights."""
    keep = states.State

    def keep_with_views(roots: Any, **options: Any) -> Any:
        model = roots.get("model 0")  # not what is of the log
        weights = [] if model is None else [w.detach() for w in model.parameters()]
        return keep({**roots, "views": weights})

    states.State = keep_with_views
