"""The hook around Megatron's training step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.utils import StragglerDetector
from megatron.training import (
    checkpointing,
    ft_integration,
    get_args,
    get_tensorboard_writer,
    get_wandb_writer,
    global_vars,
    training,
)

from megatron_sharpness.megatron.arguments import check_log_is_writable, log_path, settings_of
from megatron_sharpness.megatron.replay import RecordingSchedule, first_error, quiet, reduce_loss
from megatron_sharpness.megatron.shards import MegatronLine
from megatron_sharpness.megatron.support import check_interfaces, refuse_unsupported
from megatron_sharpness.meter import Meter, Settings, Sink, Step
from megatron_sharpness.sinks import ConsoleSink, JsonLinesSink, TensorBoardSink, WandbSink

#: What the hook replaces or calls in Megatron, beside what it imports by name.
NEEDED = (
    (training, "train_step"),
    (checkpointing, "check_checkpoint_args"),
    (global_vars, "_GLOBAL_TIMERS"),
    (ft_integration, "on_training_step_start"),
    (ft_integration, "on_training_step_end"),
    (StragglerDetector, "_instance"),
)

#: Attribute of Megatron's arguments, which every checkpoint holds, that carries the meter's state.
STATE = "critical_sharpness_state"


class MeasuredTrainStep:
    """Megatron's ``train_step``, with a measurement after the steps that are due.

    Args:
        train_step: the function to call.
        settings: when and what to measure with.
        args: Megatron's arguments, validated.
    """

    def __init__(self, train_step: Callable[..., Any], settings: Settings, args: Any) -> None:
        functools.update_wrapper(self, train_step)
        self._train_step = train_step
        self._signature = inspect.signature(train_step)
        self._settings = settings
        self._offload = args.critical_sharpness_offload == "cpu"
        self._mode = args.critical_sharpness_mode
        self._meter: Meter | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        iteration = get_args().curr_iteration + 1
        if not self._settings.due(iteration):
            return self._train_step(*args, **kwargs)
        call = self._signature.bind(*args, **kwargs)
        model, optimizer = call.arguments["model"], call.arguments["optimizer"]
        schedule = RecordingSchedule(call.arguments["forward_backward_func"], model)
        call.arguments["forward_backward_func"] = schedule
        observed = ObservedStep(optimizer, model, offload=self._offload)
        with observed.watching():
            result = self._train_step(*call.args, **call.kwargs)
        if observed.happened:
            self._measure(iteration, observed, schedule, call.arguments["config"])
        return result

    @property
    def meter(self) -> Meter:
        """Made at the first measurement, when Megatron's writers and loaded state are there."""
        if self._meter is None:
            is_writer = dist.get_rank() == dist.get_world_size() - 1
            self._meter = Meter(
                self._settings,
                sinks=_sinks() if is_writer else (),
                warn=_print if is_writer else lambda message: None,
            )
            self._meter.load_state_dict(getattr(get_args(), STATE, {}))
        return self._meter

    def _measure(
        self, iteration: int, observed: ObservedStep, schedule: RecordingSchedule, config: Any
    ) -> None:
        with quiet(schedule.model, config, self._mode):
            step = observed.agree(iteration, schedule, trained=self._mode == "train")
            line = observed.line
            try:
                self.meter.measure(step, lambda eta: _probe(line, schedule, eta / step.lr))
            finally:
                line.restore()
        setattr(get_args(), STATE, self.meter.state_dict())


def _probe(line: MegatronLine, schedule: RecordingSchedule, fraction: float) -> float:
    """The loss at θ_t + fraction·(θ_{t+1} − θ_t), the same number on every rank.

    A rank that could not write its weights makes the collectives that the others wait in all the
    same, and says so in the reduction of the loss.
    """
    losses, error = None, None
    try:
        line.move(fraction)
    except Exception as caught:
        error = caught
    line.sync()
    try:
        losses = schedule.replay()
    except Exception as caught:
        error = error or caught
    loss, _ = reduce_loss(losses, error)
    return loss


class ObservedStep:
    """One optimizer step seen from both sides, its learning rate and its outcome."""

    def __init__(self, optimizer: Any, model: Any, *, offload: bool) -> None:
        self.optimizer = optimizer
        self.line = MegatronLine(model, offload=offload)
        self.happened = False
        self._lr = 0.0
        self._weight_decay = 0.0
        self._outcome: tuple[bool, float | None] = (False, None)
        self._error: Exception | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it ``optimizer.step`` keeps θ_t before it steps."""
        attributes = vars(self.optimizer)
        replaced = attributes.get("step")  # a graph wrapper may have been set on the instance
        step = self.optimizer.step

        def watched_step(*args: Any, **kwargs: Any) -> Any:
            self._before()
            result = step(*args, **kwargs)
            self._outcome = (bool(result[0]), result[1])
            self.happened = True
            return result

        self.optimizer.step = watched_step
        try:
            yield
        finally:
            if replaced is None:
                del self.optimizer.step
            else:
                self.optimizer.step = replaced

    def _before(self) -> None:
        try:
            for group in self.optimizer.param_groups:
                if group["params"] and not group.get("is_decoupled_lr", False):
                    self._lr = max(self._lr, float(group["lr"]))
                    self._weight_decay = max(self._weight_decay, float(group["weight_decay"]))
            self.line.begin(self.optimizer)
        except Exception as caught:  # out of memory, say: the step itself goes on
            self._error = caught
            self.line.release()

    def agree(self, iteration: int, schedule: RecordingSchedule, *, trained: bool) -> Step:
        """The step as all ranks see it, ready for probes. Collective.

        Where ``trained`` is False the probes do not evaluate the loss that was trained on.
        """
        started = time.perf_counter()
        args = get_args()
        success, grad_norm = self._outcome
        if success and self._error is None:
            try:
                self.line.end()
            except Exception as caught:
                self._error = caught
        flags = torch.tensor(
            [self._error is not None, not success, self._lr, self._weight_decay],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        failed, skipped, lr, weight_decay = flags.tolist()
        seen = Step(
            iteration=iteration,
            # Megatron counts this step's samples once it is over.
            consumed_samples=args.consumed_train_samples + get_current_running_global_batch_size(),
            lr=lr,
            weight_decay=weight_decay,
            beta1=args.adam_beta1 if args.optimizer == "adam" else None,
            skipped=bool(skipped),
            failed=first_error(self._error) if failed else None,
            started=started,
        )
        if failed or skipped or lr == 0.0:
            self.line.release()
            return seen
        loss, tokens = reduce_loss(schedule.losses, None)
        products = self.line.products()
        dist.broadcast(products, src=0)
        decrease, squared_norm = products.tolist()
        return dataclasses.replace(
            seen,
            training_loss=loss if trained else None,
            tokens=tokens,
            slope=decrease / lr / self._clip_coefficient(grad_norm),
            update_norm=math.sqrt(squared_norm) / lr,
        )

    def _clip_coefficient(self, grad_norm: float | None) -> float:
        """What Megatron has multiplied the gradients by (clip_grads.py)."""
        limit = float(get_args().clip_grad)
        if not limit or not grad_norm:
            return 1.0
        return min(1.0, limit / (float(grad_norm) + 1e-6))


def _sinks() -> list[Sink]:
    """Megatron's own loggers, as they are on its writer rank, and the JSON lines."""
    args = get_args()
    sinks: list[Sink] = [ConsoleSink(_print)]
    if (path := log_path(args)) is not None:
        sinks.append(JsonLinesSink(path))
    if (writer := get_tensorboard_writer()) is not None:
        sinks.append(TensorBoardSink(writer))
    if (run := get_wandb_writer()) is not None:
        sinks.append(WandbSink(run))
    return sinks


def _print(message: str) -> None:
    print(message, flush=True)


def attach(args: Any) -> None:
    """Hook a validated Megatron configuration, or refuse it.

    Raises:
        InputError: a flag or a combination of flags cannot be measured with.
        RuntimeError: this version of Megatron lacks what the hook needs.
    """
    settings = settings_of(args)
    check_log_is_writable(args)
    refuse_unsupported(args)
    check_interfaces(NEEDED, getattr(training, "train_step", None))
    check_args = checkpointing.check_checkpoint_args

    @functools.wraps(check_args)
    def check_args_and_take_state(checkpoint_args: Any, *rest: Any, **kwargs: Any) -> Any:
        setattr(args, STATE, getattr(checkpoint_args, STATE, {}))
        return check_args(checkpoint_args, *rest, **kwargs)

    checkpointing.check_checkpoint_args = check_args_and_take_state
    training.train_step = MeasuredTrainStep(training.train_step, settings, args)
