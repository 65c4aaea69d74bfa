"""A Megatron training as a trial: it saves nothing, ends soon, and writes down what it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron.training import get_args, training

from megatron_sharpness.arguments import as_trial
from megatron_sharpness.core.recorder import Recorder
from megatron_sharpness.core.trial import Trial
from megatron_sharpness.megatron.hook import attach
from megatron_sharpness.megatron.watch import LAYOUT, write_down


def attach_trial(args: Any, trial: Trial) -> None:
    """Have a validated Megatron configuration measure and log as a trial asks, save nothing, write
    down what it is after each iteration, and end with the trial's last one.

    Raises:
        InputError: a run with these arguments cannot be measured, or not be compared with one that
            does not measure.
    """
    as_trial(args, trial)
    layout = {name: getattr(args, name, None) for name in LAYOUT}
    recorder = Recorder(trial, rank=args.rank, ranks=args.world_size, layout=layout)
    if trial.every:
        attach(args, recorder)
    training.train_step = _recorded(training.train_step, recorder, trial.iterations)


def _recorded(
    train_step: Callable[..., Any], recorder: Recorder, iterations: int
) -> Callable[..., Any]:
    signature = inspect.signature(train_step)
    last: int | None = None

    @functools.wraps(train_step)
    def recorded_train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal last
        megatron = get_args()
        given = signature.bind(*args, **kwargs).arguments
        parts = [given[name] for name in ("model", "optimizer", "opt_param_scheduler")]
        if last is None:
            last = megatron.curr_iteration + iterations
            megatron.exit_interval = last
            write_down(recorder, megatron.curr_iteration, *parts)
        recorder.begin()
        result = train_step(*args, **kwargs)
        write_down(recorder, megatron.curr_iteration + 1, *parts)
        return result

    return recorded_train_step
