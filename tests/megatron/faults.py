"""Faults that a measurement must survive, injected into a run by ``OBSERVED_FAULT``."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from megatron_sharpness import update_line
from megatron_sharpness.megatron import replay

RANK = int(os.environ["RANK"])
LAST = int(os.environ["WORLD_SIZE"]) - 1


def _at_call(number: int, fault: Callable[[], None], function: Callable[..., Any], *,
             after: bool = False) -> Callable[..., Any]:
    calls = 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if after:
            result = function(*args, **kwargs)
            if calls == number:
                fault()
            return result
        if calls == number:
            fault()
        return function(*args, **kwargs)

    return faulty


def _raise(error: Exception) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


def exception_on_last_rank() -> None:
    """Before the forward pass of a probe in the middle of the second measurement."""
    if RANK == LAST:
        replay.RecordingSchedule.replay = _at_call(
            10, _raise(RuntimeError("injected")), replay.RecordingSchedule.replay
        )


def exception_after_forward_on_last_rank() -> None:
    """After the forward pass, where model-parallel peers no longer wait for this rank."""
    if RANK == LAST:
        replay.RecordingSchedule.replay = _at_call(
            10, _raise(RuntimeError("injected")), replay.RecordingSchedule.replay, after=True
        )


def out_of_memory_in_snapshot() -> None:
    """On one rank, at the second measurement's snapshot."""
    if RANK == 0:
        update_line.UpdateLine.begin = _at_call(
            2, _raise(torch.OutOfMemoryError("injected")), update_line.UpdateLine.begin
        )


def out_of_memory_in_move() -> None:
    """On one rank, while a probe's weights are written."""
    if RANK == 0:
        update_line.UpdateLine.move = _at_call(
            6, _raise(torch.OutOfMemoryError("injected")), update_line.UpdateLine.move
        )


def non_repeating_loss() -> None:
    """A forward pass that answers differently every time, on the same weights."""
    real, calls = replay.reduce_loss, 0

    def noisy(losses: Any, error: Exception | None) -> tuple[float, int]:
        nonlocal calls
        calls += 1
        loss, tokens = real(losses, error)
        return loss + (1e-4 if calls % 2 else 0.0), tokens

    replay.reduce_loss = noisy
    from megatron_sharpness.megatron import hook

    hook.reduce_loss = noisy


def sigterm_during_probe() -> None:
    """The cluster ends the job in the middle of the second measurement."""
    replay.RecordingSchedule.replay = _at_call(
        10, lambda: os.kill(os.getpid(), signal.SIGTERM), replay.RecordingSchedule.replay
    )


def canonical() -> None:
    """No fault: weights that do not depend on the parallel layout."""
    from tests.megatron import canonical as weights

    weights.install()
