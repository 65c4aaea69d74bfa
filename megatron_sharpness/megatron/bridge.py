"""Critical sharpness in Megatron-Bridge, as one of its training callbacks."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch.distributed as dist

from megatron_sharpness.core.errors import InputError, SettingError
from megatron_sharpness.core.frozen import FrozenRun
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.meter import Meter, Sink
from megatron_sharpness.core.recorder import Recorder
from megatron_sharpness.core.settings import Settings, check_sinks
from megatron_sharpness.core.trial import Trial
from megatron_sharpness.data.evaluation import EvaluationSet
from megatron_sharpness.report.verdict import log_verdict
from megatron_sharpness.sinks import ConsoleSink, JsonLinesSink, curve_sinks

try:
    from megatron.bridge.training import train
    from megatron.bridge.training.callbacks import Callback, CallbackContext
    from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
    from megatron.core.timers import Timers
    from megatron.core.utils import get_model_config

    from megatron_sharpness.megatron import bridge_data
    from megatron_sharpness.megatron.parts import PartsOfModel
    from megatron_sharpness.megatron.quiet import quiet
    from megatron_sharpness.megatron.replay import RecordingSchedule, current_device
    from megatron_sharpness.megatron.second_moments import check_has_moments
    from megatron_sharpness.megatron.shards import trained_tensors
    from megatron_sharpness.megatron.step import ObservedStep
    from megatron_sharpness.megatron.support import refuse_unsupported
    from megatron_sharpness.megatron.watch import LAYOUT, write_down
except ImportError as error:
    raise ImportError(
        f"megatron_sharpness.megatron.bridge needs Megatron-Bridge ({error}): run it in NVIDIA's "
        'NeMo Framework container, or pip install ".[bridge]" in a clone of megatron_sharpness'
    ) from error


class CriticalSharpnessCallback(Callback):
    """Measures critical sharpness λ_c = 2/η_c (Def. 2.1) in Megatron-Bridge's training loop.

    ::

        pretrain(config, forward_step, callbacks=[CriticalSharpnessCallback(every=100)])

    Make one for each call of ``pretrain`` or ``finetune``, before it. Records go to the run's
    TensorBoard and W&B, to ``critical_sharpness.jsonl`` beside TensorBoard's logs and to the
    training log.

    Args:
        every: measure at every iteration that this number divides; 0 is off.
        sinks: where records go in addition, from the last rank, which is Bridge's logging one.
        mode: ``train`` replays the step's own dropout masks; ``eval`` switches dropout off.
        offload: ``cpu`` keeps the copy of the parameters in host memory.
        eval_data: other data by name, along the same updates: the path of Megatron's ``.bin`` and
            ``.idx`` without the suffix, or of a file of JSON lines with a prompt and an answer.
        eval_samples: of each, drawn by the run's seed; as many as a global batch if None.
        frozen: train nothing: every step is taken back, while the optimizer's moments go on, and
            steps are measured after this number of them.
        settings: the other fields of :class:`~megatron_sharpness.core.settings.Settings`.

    Raises:
        InputError: something here cannot be measured with; the message says why and what to do.
    """

    def __init__(
        self,
        every: int = 100,
        sinks: Sequence[Sink] = (),
        *,
        mode: Literal["train", "eval"] = "train",
        offload: Literal["none", "cpu"] = "none",
        eval_data: Mapping[str, str | Path] | None = None,
        eval_samples: int | None = None,
        frozen: int | None = None,
        **settings: Any,
    ) -> None:
        if mode not in ("train", "eval"):
            raise SettingError("mode", mode, "give 'train' or 'eval'")
        if offload not in ("none", "cpu"):
            raise SettingError("offload", offload, "give 'none' or 'cpu'")
        trial = Trial.asked_for()
        self._trial = None if trial is None else _InTrial(trial)
        every = every if trial is None else trial.every
        self._settings = Settings.of(self, every=every, **settings)
        check_sinks(sinks)
        self._sinks = sinks
        self._sources = bridge_data.sources(eval_data or {})
        self._samples = eval_samples
        self._others: list[EvaluationSet] = []
        self._frozen = _checked_frozen(frozen, every, trial)
        self._frozen_run: FrozenRun | None = None
        self._mode = mode
        self._offload = offload == "cpu"
        self._schedule: Any = None
        self._recording: RecordingSchedule | None = None
        self._observed: ObservedStep | None = None
        self._parts: PartsOfModel | None = None
        self._watching = contextlib.ExitStack()
        self._due = False
        if every:
            self._stand_in_for_schedule()

    def _stand_in_for_schedule(self) -> None:
        """Have the coming ``train()`` call :meth:`_forward_backward` for its schedule.

        It fetches the schedule before its first event, and no event hands it out.
        """
        fetch = train.get_forward_backward_func

        def fetch_once(*args: Any, **kwargs: Any) -> Any:
            train.get_forward_backward_func = fetch
            self._schedule = fetch(*args, **kwargs)
            return self._forward_backward

        train.get_forward_backward_func = fetch_once

    def _forward_backward(self, **kwargs: Any) -> Any:
        return (self._recording or self._schedule)(**kwargs)

    def on_train_start(self, context: CallbackContext) -> None:
        state = context.state
        if self._trial is not None:
            self._trial.begin(context)
        if not self._settings.every:
            return
        dist_train = getattr(state.cfg.model, "dist_train", None)
        if self._schedule is None or getattr(dist_train, "use_dist_train", False):
            raise InputError(
                "CriticalSharpnessCallback: this training loop runs a schedule that it could not "
                "record. Make a new callback for every call of pretrain, before it, and leave it "
                "out of MegatronMIMO's and DistTrain's loops."
            )
        refuse_unsupported(_options(context), self_tests=False)
        if self._settings.adam_snr:
            check_has_moments(_options(context))
        if self._frozen is not None and state.cfg.checkpoint.save is not None:
            raise SettingError(
                "frozen",
                self._frozen,
                "nothing is trained that could be saved; set checkpoint.save to None",
            )
        if self._sources:
            self._others = bridge_data.evaluation_sets(
                state, _options(context), self._sources, self._samples
            )
        if (parts := self._settings.parts) is not None:
            self._parts = PartsOfModel(parts, context.model, context.optimizer)
        confirm = None if self._trial is None else self._trial.recorder.confirm
        self._meter = Meter(self._settings, warn=lambda message: None, confirm=confirm)
        self._meter.load_state_dict(
            _StateLines.read(state.cfg.checkpoint.load, state.train_state.step)
        )
        if dist.get_rank() == dist.get_world_size() - 1:  # where Bridge's loggers are
            self._meter.warn = _print
            self._meter.sinks = (
                [*_sinks(state, self._meter), *self._sinks]
                if self._trial is None
                else [JsonLinesSink(self._trial.trial.log)]
            )

    def on_train_step_start(self, context: CallbackContext) -> None:
        if self._trial is not None:
            self._trial.recorder.begin()
        iteration = context.state.train_state.step + 1
        self._due = bool(self._settings.every) and (
            self._meter.due(iteration) and iteration > (self._frozen or 0)
        )
        if self._frozen is not None and self._frozen_run is None:
            self._frozen_run = FrozenRun(
                functools.partial(trained_tensors, context.model, context.optimizer)
            )
        if self._due or self._frozen is not None:
            self._recording = RecordingSchedule(
                self._schedule, context.model, beside=bridge_data.FINETUNING
            )
            if self._trial is not None:
                self._recording.take_times(self._trial.recorder)
            self._observed = ObservedStep(
                context.optimizer,
                context.model,
                _options(context),
                offload=self._offload,
                parts=self._parts if self._settings.due_parts(iteration) else None,
            )
            self._watching.enter_context(self._observed.watching())

    def on_train_step_end(self, context: CallbackContext) -> None:
        self._measure(context)
        if self._trial is not None:
            self._trial.write_down(context, context.state.train_state.step + 1)

    def _measure(self, context: CallbackContext) -> None:
        observed, recording, state = self._observed, self._recording, context.state
        self._watching.close()
        self._observed = self._recording = None
        if observed is None or recording is None:
            return
        if observed.happened and self._due:
            self._measure_step(context, observed, recording)
        elif observed.happened:
            observed.undo()
        if self._frozen_run is not None:
            recording.restore_state()
            iteration, train = state.train_state.step + 1, state.cfg.train
            exits = train.exit_interval and iteration % train.exit_interval == 0
            if exits or iteration == train.train_iters:  # an exit has no event
                self._frozen_run.finish(_print if dist.get_rank() == 0 else lambda message: None)

    def _measure_step(
        self, context: CallbackContext, observed: ObservedStep, recording: RecordingSchedule
    ) -> None:
        state, frozen = context.state, self._frozen is not None
        with _off_the_clock(state):
            watch = observed.watch() if self._meter.watches and not frozen else None
            with _undisturbed(context, self._mode, observed.fail):
                records = observed.measure(
                    self._meter,
                    recording,
                    # Bridge counts this step and its samples after the event.
                    iteration=state.train_state.step + 1,
                    consumed_samples=state.train_state.consumed_train_samples
                    + get_current_running_global_batch_size(),
                    trained=self._mode == "train",
                    others=self._others,
                    frozen=frozen,
                )
            changed = watch.changes(current_device()) if watch is not None else None
            self._meter.write(records, changed)

    def on_train_end(self, context: CallbackContext) -> None:
        if self._settings.every and self._frozen is None:
            log_verdict(self._meter.sinks)


class _InTrial:
    """A trial of Bridge's training: it saves nothing, ends soon, and writes down what it is.

    Attributes:
        recorder: what writes.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.recorder: Any = None

    def begin(self, context: CallbackContext) -> None:
        """Before the first step: Bridge asks for its configuration as it goes."""
        cfg, state = context.state.cfg, context.state
        cfg.checkpoint.save = None
        cfg.logger.log_interval = 1
        cfg.train.exit_interval = state.train_state.step + self.trial.iterations
        if cfg.logger.tensorboard_dir is not None:
            cfg.logger.tensorboard_dir = str(self.trial.folder / "tensorboard")
            state._tensorboard_logger = None  # made anew when it is asked for
        ranks = dist.get_world_size()
        self.recorder = Recorder(
            self.trial, rank=dist.get_rank(), ranks=ranks,
            layout={
                **{name: getattr(_options(context), name, None) for name in LAYOUT},
                "world_size": ranks,
            },
        )  # fmt: skip

        self.write_down(context, state.train_state.step)

    def write_down(self, context: CallbackContext, number: int) -> None:
        """What this rank is after an iteration."""
        write_down(self.recorder, number, context.model, context.optimizer, context.scheduler)


def _options(context: CallbackContext) -> SimpleNamespace:
    """The run's configuration under the names that Megatron's arguments have."""
    cfg = context.state.cfg
    parts = (cfg.dist, cfg.ddp, get_model_config(context.model[0]), cfg.optimizer)
    return SimpleNamespace(**{name: value for part in parts for name, value in vars(part).items()})


def _checked_frozen(frozen: int | None, every: int, trial: Trial | None) -> int | None:
    if frozen is None:
        return None
    if trial is not None:
        raise SettingError(
            "frozen", frozen, "it trains nothing that could be compared; leave it out to verify"
        )
    if isinstance(frozen, bool) or not isinstance(frozen, int) or frozen < 0:
        raise SettingError("frozen", frozen, "a number of steps; give 0 or more, or leave it out")
    if not every:
        raise SettingError("frozen", frozen, "every=0 measures nothing; give every=1")
    return frozen


def _sinks(state: Any, meter: Meter) -> list[Sink]:
    """Bridge's own loggers, the JSON lines and the state."""
    sinks: list[Sink] = [ConsoleSink(_print)]
    if (folder := state.cfg.logger.tensorboard_dir) is not None:
        sinks.append(JsonLinesSink(Path(folder) / "critical_sharpness.jsonl"))
    sinks += curve_sinks(state.tensorboard_logger, state.wandb_logger)
    if (folder := state.cfg.checkpoint.save) is not None and "://" not in folder:
        sinks.append(_StateLines(folder, meter))
    return sinks


_print = functools.partial(print, flush=True)


@contextlib.contextmanager
def _undisturbed(
    context: CallbackContext, mode: str, fail: Callable[[Exception], object]
) -> Iterator[None]:
    """Outside of the operations that Bridge counts for a step, and without checks."""
    state = context.state
    checks = state.cfg.rerun_state_machine
    switches = [
        (checks, "check_for_nan_in_loss", False),
        (checks, "check_for_spiky_loss", False),
        (state, "_timers", Timers(0, "minmax")),
    ]
    operations = {name: value for name, value in vars(state).items() if name.startswith("_flops")}
    try:
        config = get_model_config(context.model[0])
        with quiet(context.model, config, mode, switches, fail):
            yield
    finally:
        vars(state).update(operations)


@contextlib.contextmanager
def _off_the_clock(state: Any) -> Iterator[None]:
    """Outside of the time that Bridge logs for an iteration."""
    interval = state.timers("interval-time", log_level=0)
    interval.stop()
    try:
        yield
    finally:
        interval.start()


class _StateLines:
    """A sink that keeps the meter's state: one line a measurement, beside Bridge's checkpoints,
    which have no place for a callback's state."""

    NAME = "critical_sharpness_state.jsonl"

    def __init__(self, folder: str, meter: Meter) -> None:
        self.folder = Path(folder)
        self.meter = meter

    def write(self, measurement: Measurement) -> None:
        line = {"iteration": measurement.iteration, "state": self.meter.state_dict()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / self.NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @classmethod
    def read(cls, folder: str | None, step: int) -> dict[str, Any]:
        """The state at the checkpoint of ``step``. Collective: rank 0 reads for all."""
        found: list[Any] = [{}]
        if folder is not None and dist.get_rank() == 0:
            paths = Path(folder, cls.NAME), Path(folder).parent / cls.NAME  # of iter_0001000 itself
            lines = [json.loads(line) for path in paths if path.is_file() for line in path.open()]
            past = [{"iteration": 0, "state": {}}] + [x for x in lines if x["iteration"] <= step]
            # Iterations that were trained again have several lines, the last of which counts.
            found = [sorted(past, key=lambda line: line["iteration"])[-1]["state"]]
        dist.broadcast_object_list(found, src=0)
        return dict(found[0])
