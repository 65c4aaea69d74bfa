"""The promises proved with a training loop of one's own."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.replay import RandomStates
from megatron_sharpness.core.trial import Trial
from megatron_sharpness.pytorch.losses import Evaluate
from megatron_sharpness.pytorch.trial import TrialSharpness
from megatron_sharpness.verify import runs
from megatron_sharpness.verify.page import Verification
from megatron_sharpness.verify.traces import iterations_done

#: Seconds that a rank waits for what the others have written down.
PATIENCE = 60.0


#: What the caller knows steps and interval as.
_NAMES = ("steps=", "every=")


class _Over(BaseException):
    """A trial has made all its steps: no ``except Exception`` of the loop holds it."""


def verify(
    train: Callable[[Callable[..., TrialSharpness]], object],
    steps: int = 12,
    *,
    every: int = 3,
    out: Path | str | None = None,
) -> Verification:
    """Run a training loop without measurement, twice, and with it, and compare.

    ::

        def train(sharpness):
            model, optimizer = ...
            sharpness = sharpness(model, optimizer)  # in place of CriticalSharpness
            for step, batch in enumerate(batches):
                ...
                sharpness.after_step(step, lambda: loss_sum_and_tokens(model, batch))

        print(verify(train))

    Each run begins with the random states of the first. Under torchrun every process calls it.

    Args:
        train: runs the loop anew, from the beginning, with what takes the arguments of
            :class:`~megatron_sharpness.pytorch.CriticalSharpness`; its ``every`` and ``sinks`` are
            not used. It is left by an exception after ``steps`` calls of ``after_step``.
        steps: of each run.
        every: measure after the steps that this number divides.
        out: folder of the page ``verify.md``, its JSON, and what the ranks have written down; None,
            for one process alone, keeps nothing.

    Returns:
        What was found: ``status`` is 0 if all promises hold, 1 if one does not, and 2 if it could
        not be told; as a string it says why.

    Raises:
        InputError: with these arguments nothing can be told, or ``train`` made other steps.
    """
    if out is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("out=None: the processes have to meet in a folder; give one they all see")
    if out is None:
        runs.trials(Path(), steps, every, _NAMES)  # refused, if so, before a folder is made
        with tempfile.TemporaryDirectory() as folder:
            return verify(train, steps, every=every, out=folder)
    out, random, is_first = Path(out), RandomStates(), os.environ.get("RANK", "0") == "0"
    trials = runs.trials(out, steps, every, _NAMES)
    if is_first:
        runs.begin(out)
    if dist.is_initialized():  # else the loop makes the group, once the first rank has come
        dist.barrier()
    for trial in trials.values():
        random.restore()
        _run(train, trial)
    random.restore()
    _wait(list(trials.values()))
    found = runs.judge(out, trials, ())
    if is_first:
        runs.write(out, found)
    return found


def _run(train: Callable[[Callable[..., TrialSharpness]], object], trial: Trial) -> None:
    made: list[Any] = []

    class Sharpness(TrialSharpness):
        """Leaves the loop after the trial's last step."""

        def after_step(self, step: int, evaluate: Evaluate, **given: Any) -> Measurement | None:
            record = super().after_step(step, evaluate, **given)
            made.append(step)
            if len(made) == trial.iterations:
                self.close()
                raise _Over
            return record

    try:
        train(lambda *args, **options: Sharpness(trial, *args, **options))
    except _Over:
        return
    raise InputError(
        f"steps={trial.iterations}: the loop has made {len(made)} and was over; give as many, or "
        "call after_step after every step"
    )


def _wait(trials: list[Trial]) -> None:
    """Until all ranks have written down all that they have made."""
    until = time.monotonic() + PATIENCE
    for trial in trials:
        for rank in range(int(os.environ.get("WORLD_SIZE", "1"))):
            while iterations_done(trial.folder, rank) < trial.iterations:
                if time.monotonic() > until:
                    return  # and let it be said which is missing
                time.sleep(0.05)
