"""The hook around Megatron's training step."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.timers import Timers
from megatron.core.utils import StragglerDetector
from megatron.training import (
    checkpointing,
    ft_integration,
    get_args,
    get_tensorboard_writer,
    get_timers,
    get_tokenizer,
    get_wandb_writer,
    global_vars,
    training,
)

from megatron_sharpness.adaptive_mix.adaptive import AdaptiveMix
from megatron_sharpness.arguments import (
    as_flag,
    check_evaluation,
    check_log_is_writable,
    interleaved_group,
    log_path,
    settings_of,
)
from megatron_sharpness.core.errors import SettingError
from megatron_sharpness.core.frozen import FrozenRun
from megatron_sharpness.core.meter import Meter, Sink
from megatron_sharpness.core.recorder import Recorder
from megatron_sharpness.core.settings import Settings
from megatron_sharpness.data import evaluation
from megatron_sharpness.data.evaluation import EvaluationSet
from megatron_sharpness.megatron import graphs
from megatron_sharpness.megatron.parts import PartsOfModel
from megatron_sharpness.megatron.quiet import quiet
from megatron_sharpness.megatron.replay import RecordingSchedule, current_device, noting
from megatron_sharpness.megatron.second_moments import check_has_moments
from megatron_sharpness.megatron.shards import trained_tensors
from megatron_sharpness.megatron.step import ObservedStep
from megatron_sharpness.megatron.support import (
    check_interfaces,
    faults_of_megatron,
    refuse_unsupported,
    self_tested_here,
)
from megatron_sharpness.report.verdict import log_verdict
from megatron_sharpness.sinks import ConsoleSink, JsonLinesSink, curve_sinks

#: What the hook replaces or calls in Megatron, beside what it imports by name.
NEEDED = (
    (training, "train_step"),
    (checkpointing, "check_checkpoint_args"),
    (global_vars, "_GLOBAL_TIMERS"),
    (ft_integration, "on_training_step_start"),
    (ft_integration, "on_training_step_end"),
    (StragglerDetector, "_instance"),
)

#: Attributes of Megatron's arguments, which every checkpoint holds: the states of meter and mix.
STATE, MIX_STATE = "critical_sharpness_state", "critical_sharpness_mix"


class MeasuredTrainStep:
    """Megatron's ``train_step``, with a measurement after the steps that are due.

    Args:
        train_step: the function to call.
        settings: when and what to measure with.
        args: Megatron's arguments, validated.
        sources: paths of evaluation data by name.
        recorder: of a trial, that confirms what is measured.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        settings: Settings,
        args: Any,
        sources: Mapping[str, Path],
        recorder: Recorder | None,
    ) -> None:
        functools.update_wrapper(self, train_step)
        self._train_step = train_step
        self._signature = inspect.signature(train_step)
        self._settings = settings
        self._offload = args.critical_sharpness_offload == "cpu"
        self._mode = args.critical_sharpness_mode
        self._frozen: int | None = args.critical_sharpness_frozen
        self._frozen_run: FrozenRun | None = None
        self._sources = sources
        self._recorder = recorder
        self._others: list[EvaluationSet] | None = None
        self._meter: Meter | None = None
        self._parts: PartsOfModel | None = None
        #: A mix of data that follows the measurements, where the script has one.
        self.mix: AdaptiveMix | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        iteration = get_args().curr_iteration + 1
        if self._others is None:  # before the first step: the tokenizer is there
            self._others = [_evaluation_set(name, path) for name, path in self._sources.items()]
        due = self.meter.due(iteration) and iteration > (self._frozen or 0)
        call = self._signature.bind(*args, **kwargs)
        graphs.note_losses(call.arguments["forward_backward_func"], noting)  # before it is captured
        model, optimizer = call.arguments["model"], call.arguments["optimizer"]
        if self._parts is None and self._settings.parts is not None:  # before the first step
            with _named_as_flags():
                self._parts = PartsOfModel(self._settings.parts, model, optimizer)
        if not due and self._frozen is None:
            return self._train_step(*args, **kwargs)
        if self._frozen is not None and self._frozen_run is None:
            self._frozen_run = FrozenRun(partial(trained_tensors, model, optimizer))
        schedule = RecordingSchedule(call.arguments["forward_backward_func"], model)
        if self._recorder is not None:
            schedule.take_times(self._recorder)
        call.arguments["forward_backward_func"] = schedule
        parts = self._parts if self._settings.due_parts(iteration) else None
        observed = ObservedStep(optimizer, model, get_args(), offload=self._offload, parts=parts)
        with observed.watching():
            result = self._train_step(*call.args, **call.kwargs)
        if observed.happened and due:
            self._measure(iteration, observed, schedule, call.arguments["config"])
        elif observed.happened:
            observed.undo()
        if self._frozen_run is not None:
            schedule.restore_state()
            given = get_args()
            exits = given.exit_interval and iteration % given.exit_interval == 0
            if exits or iteration == given.train_iters:
                self._frozen_run.finish(printing_on(0))
        return result

    @property
    def meter(self) -> Meter:
        """Made at the first step, when Megatron's writers and loaded state are there."""
        if self._meter is None:
            sinks = _sinks() if dist.get_rank() == dist.get_world_size() - 1 else []
            if self._frozen is None:
                atexit.register(log_verdict, sinks)  # Megatron ends in more than one place
            self._meter = Meter(
                self._settings,
                sinks=sinks,
                warn=printing_on(dist.get_world_size() - 1),
                self_tested=self_tested_here(get_args()),
                confirm=None if self._recorder is None else self._recorder.confirm,
            )
            self._meter.load_state_dict(getattr(get_args(), STATE, {}))
        return self._meter

    def _measure(
        self, iteration: int, observed: ObservedStep, schedule: RecordingSchedule, config: Any
    ) -> None:
        args = get_args()
        switches = [
            (args, "check_for_nan_in_loss_and_grad", False),
            (args, "check_for_spiky_loss", False),
            (global_vars, "_GLOBAL_TIMERS", Timers(0, "minmax")),
        ]
        # Megatron counts this step's samples once it is over.
        consumed = args.consumed_train_samples + get_current_running_global_batch_size()
        frozen = self._frozen is not None
        with _off_the_clock():
            watch = observed.watch() if self.meter.watches and not frozen else None
            with quiet(schedule.model, config, self._mode, switches, observed.fail):
                records = observed.measure(
                    self.meter,
                    schedule,
                    iteration=iteration,
                    consumed_samples=consumed,
                    trained=self._mode == "train",
                    others=self._others or (),
                    frozen=frozen,
                )
            changed = watch.changes(current_device()) if watch is not None else None
            records = self.meter.write(records, changed)
        setattr(args, STATE, self.meter.state_dict())
        if self.mix is not None:
            self.mix.observe(records, consumed)
            setattr(args, MIX_STATE, self.mix.state_dict())


@contextlib.contextmanager
def _off_the_clock() -> Iterator[None]:
    """Outside of the time that Megatron logs for an iteration and that its watchdog allows."""
    interval = get_timers()("interval-time", log_level=0)
    interval.stop()
    ft_integration.on_training_step_end()
    try:
        yield
    finally:
        ft_integration.on_training_step_start()
        interval.start()


def _evaluation_set(name: str, path: Path) -> EvaluationSet:
    args = get_args()
    tokenizer = get_tokenizer()
    is_bytes = args.tokenizer_type == "NullTokenizer"
    return evaluation.read(
        name,
        path,
        samples=args.critical_sharpness_eval_samples,
        length=args.seq_length,
        seed=args.seed,
        # Megatron's NullTokenizer reads numbers; ours are the bytes that `tokenize` writes.
        tokenize=evaluation.byte_tokens if is_bytes else tokenizer.tokenize,
        end=tokenizer.eod,
        vocabulary=args.padded_vocab_size,
    )


@contextlib.contextmanager
def _named_as_flags() -> Iterator[None]:
    try:
        yield
    except SettingError as error:
        raise as_flag(error) from None


def _sinks() -> list[Sink]:
    """Megatron's own loggers, as they are on its writer rank, and the JSON lines."""
    args = get_args()
    sinks: list[Sink] = [ConsoleSink(_print)]
    if (path := log_path(args)) is not None:
        sinks.append(JsonLinesSink(path))
    return [*sinks, *curve_sinks(get_tensorboard_writer(), get_wandb_writer())]


def printing_on(rank: int) -> Callable[[str], None]:
    """A function that prints a line on this rank, and nothing on the others."""
    return _print if dist.get_rank() == rank else _silent


def _print(message: str) -> None:
    print(message, flush=True)


def _silent(message: str) -> None:
    pass


def attach(args: Any, recorder: Recorder | None = None) -> None:
    """Hook a validated Megatron configuration, or refuse it.

    Args:
        args: Megatron's arguments.
        recorder: of a trial, that confirms what is measured.

    Raises:
        InputError: a flag or a combination of flags cannot be measured with.
        RuntimeError: this version of Megatron lacks what the hook needs.
    """
    settings = settings_of(args)
    sources = check_evaluation(
        args, args.micro_batch_size * args.data_parallel_size * interleaved_group(args)
    )
    check_log_is_writable(args)
    refuse_unsupported(args)
    if settings.adam_snr:
        with _named_as_flags():
            check_has_moments(args)
    for fault in faults_of_megatron(args):
        warnings.warn(f"Megatron itself is wrong here: {fault}", stacklevel=2)
    check_interfaces(NEEDED, getattr(training, "train_step", None))
    check_args = checkpointing.check_checkpoint_args

    @functools.wraps(check_args)
    def check_args_and_take_state(checkpoint_args: Any, *rest: Any, **kwargs: Any) -> Any:
        for state in (STATE, MIX_STATE):
            setattr(args, state, getattr(checkpoint_args, state, {}))
        return check_args(checkpoint_args, *rest, **kwargs)

    checkpointing.check_checkpoint_args = check_args_and_take_state
    training.train_step = MeasuredTrainStep(
        training.train_step, settings, args, sources, recorder
    )
