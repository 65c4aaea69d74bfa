"""The command-line flags, the same for Megatron and for the FSDP2 training script."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, get_args

from megatron_sharpness.core.errors import InputError, SettingError, flag_of
from megatron_sharpness.core.search import Method
from megatron_sharpness.core.settings import Settings
from megatron_sharpness.core.trial import Trial
from megatron_sharpness.data import evaluation

#: Field of :class:`~megatron_sharpness.core.settings.Settings` → flag.
FLAGS = {
    "every": "--measure-critical-sharpness-every",
    "method": "--critical-sharpness-method",
    "tolerance": "--critical-sharpness-tolerance",
    "initial_guess": "--critical-sharpness-initial-guess",
    "max_evaluations": "--critical-sharpness-max-evaluations",
    "on_error": "--critical-sharpness-on-error",
    "watch": "--critical-sharpness-watch",
    "parts": "--critical-sharpness-parts",
    "parts_every": "--critical-sharpness-parts-every",
    "adam_snr": "--measure-adam-snr",
    "alarm": "--critical-sharpness-alarm",
    "alarm_after": "--critical-sharpness-alarm-after",
    "alarm_every": "--critical-sharpness-alarm-every",
}


_SAMPLES = "--critical-sharpness-eval-samples"
_FROZEN = "--critical-sharpness-frozen"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group "critical sharpness" to a parser: Megatron's own, or a script's."""
    group = parser.add_argument_group(
        "critical sharpness",
        "Curvature of the loss along the optimizer's own updates (arXiv 2601.16979).",
    )
    defaults = Settings()
    group.add_argument(
        FLAGS["every"],
        type=int,
        default=0,
        metavar="N",
        help="Measure critical sharpness at every iteration that N divides; 0, the default, is "
        "off. A measurement takes about as long as a training iteration or a little more.",
    )
    group.add_argument(
        FLAGS["method"],
        choices=get_args(Method),
        default=defaults.method,
        help="Line search for the critical learning rate: 'certified' predicts it from the slope, "
        "certifies a bracket and interpolates in it; 'bisection' is the paper's, to the letter, "
        "and takes more than twice as many forward passes.",
    )
    group.add_argument(
        FLAGS["tolerance"],
        type=float,
        default=defaults.tolerance,
        help="Relative width |1 - lower/upper| of the bracket around the critical learning rate, "
        "between 0 and 1 (default: 1/4 with 'certified', whose critical learning rate is as "
        "accurate as the middle of 1/16, and 1/16 with 'bisection').",
    )
    group.add_argument(
        FLAGS["initial_guess"],
        type=float,
        default=None,
        help="Learning rate at which the first search starts (default: the step's own). Later "
        "ones start where the last one ended, also after a resume.",
    )
    group.add_argument(
        FLAGS["max_evaluations"],
        type=int,
        default=defaults.max_evaluations,
        help="Most forward passes that one measurement's search may spend (default: 40).",
    )
    group.add_argument(
        "--critical-sharpness-mode",
        choices=["train", "eval"],
        default="train",
        help="'train' replays the step's own dropout masks, so that the loss is the one that was "
        "trained on; 'eval' switches dropout off and evaluates the loss before the step too.",
    )
    group.add_argument(
        "--critical-sharpness-offload",
        choices=["none", "cpu"],
        default="none",
        help="Where the copy of the owned shard of fp32 parameters lies during a measurement.",
    )
    group.add_argument(
        evaluation.FLAG,
        nargs="+",
        default=[],
        metavar="NAME=PREFIX",
        help="Data on which the relative critical sharpness is measured too, each time: how far "
        "the training update can go before the loss on it rises. PREFIX.bin and PREFIX.idx in "
        "Megatron's format, or a file of JSON lines with a prompt (or question) and an answer, of "
        "which the answer counts.",
    )
    group.add_argument(
        _SAMPLES,
        type=int,
        default=None,
        metavar="N",
        help="Samples of each, the same ones every time, drawn by --seed (default: "
        "--global-batch-size).",
    )
    group.add_argument(
        _FROZEN,
        type=int,
        default=None,
        metavar="N",
        help="Train nothing: take every step back, while the optimizer's moments go on, and "
        "measure after the first N steps. For a model that is given, by --load.",
    )
    group.add_argument(
        "--critical-sharpness-log",
        type=str,
        default=None,
        metavar="PATH",
        help="File for one JSON line a measurement (default: critical_sharpness.jsonl in "
        "--tensorboard-dir).",
    )
    group.add_argument(
        FLAGS["on_error"],
        choices=["warn", "raise"],
        default=defaults.on_error,
        help="What a failed measurement does: 'warn' and train on, or 'raise'.",
    )
    group.add_argument(
        FLAGS["watch"],
        choices=["first", "always"],
        default=defaults.watch,
        help="Which measurements are watched, whether they leave all that training reads later as "
        "it was: the 'first' of a run, the default, or 'always'. It takes less than an iteration.",
    )
    group.add_argument(
        FLAGS["parts"],
        nargs="+",
        default=None,
        metavar="PRESET | NAME=REGEX",
        help="Measure the update of each part of the model alone, too, while the rest stays where "
        "it was: which part breaks first. 'modules' (embeddings, attention, mlp, experts, router, "
        "norms, output), 'groups' (of the optimizer's parameters), 'layers' (thirds of the "
        "depth), or names with a regular expression of parameters' names each.",
    )
    group.add_argument(
        FLAGS["parts_every"],
        type=int,
        default=None,
        metavar="N",
        help="Do so at every iteration that N divides, a multiple of the interval of measurements "
        "(default: at each of them). A part takes two or three forward passes.",
    )
    group.add_argument(
        FLAGS["adam_snr"],
        action="store_true",
        help="Measure the signal-to-noise ratios of Adam's second moments, too: which of them "
        "could be replaced by their means, and how much memory that would save (arXiv 2503.01843).",
    )
    group.add_argument(
        FLAGS["alarm"],
        type=float,
        default=defaults.alarm,
        metavar="R",
        help="Warn where the learning rate over the critical one is above R at several "
        "measurements in a row: in the log, as a text in TensorBoard and an alert in W&B. Above 1 "
        "a step raises the loss of its own batch. Off by default.",
    )
    group.add_argument(
        FLAGS["alarm_after"],
        type=int,
        default=defaults.alarm_after,
        metavar="K",
        help="How many measurements in a row begin the alarm, and end it (default: %(default)s).",
    )
    group.add_argument(
        FLAGS["alarm_every"],
        type=int,
        default=defaults.alarm_every,
        metavar="N",
        help="While the alarm lasts, measure at every iteration that N divides, too.",
    )
    return parser


def as_trial(args: Any, trial: Trial) -> None:
    """Have arguments measure and log as a trial asks, and save nothing.

    Args:
        args: the parsed arguments, of Megatron or of the FSDP2 training script.
        trial: what is asked for.

    Raises:
        InputError: a run with these arguments cannot be compared with one that does not measure.
    """
    for name, reason in (
        ("critical_sharpness_frozen", "it trains nothing that could be compared"),
        ("adaptive_mix", "with it training follows the measurements, and differs without them"),
    ):
        value = getattr(args, name, None)
        if value is not None and value is not False:  # --critical-sharpness-frozen 0 is a value
            raise InputError(f"{flag_of(name)}: {reason}; leave it out of the command to verify")
    args.measure_critical_sharpness_every = trial.every
    args.critical_sharpness_log = str(trial.log)
    args.save = None
    args.log_progress = False
    args.log_interval = 1
    if args.tensorboard_dir:
        args.tensorboard_dir = str(trial.folder / "tensorboard")


def interleaved_group(args: Any) -> int:
    """How many micro-batches Megatron's schedule takes at a time: 1 but for the interleaved one."""
    if not getattr(args, "virtual_pipeline_model_parallel_size", None):
        return 1
    group = getattr(args, "microbatch_group_size_per_vp_stage", None)
    return int(group or args.pipeline_model_parallel_size)


def check_evaluation(args: Any, samples_at_once: int) -> dict[str, Path]:
    """The paths of the evaluation data by name; fills in how many samples each has.

    Args:
        args: the parsed arguments.
        samples_at_once: the least that all data-parallel ranks can take together.

    Raises:
        InputError: names the flag, the value, the reason and the remedy.
    """
    frozen = args.critical_sharpness_frozen
    if frozen is not None and frozen < 0:
        raise _bad(_FROZEN, frozen, "a number of steps; give 0 or more, or leave it out")
    if frozen is not None and args.save:
        raise _bad(_FROZEN, frozen, "nothing is trained that could be saved; leave out --save")
    if args.critical_sharpness_eval_samples is None:
        args.critical_sharpness_eval_samples = args.global_batch_size
    count = args.critical_sharpness_eval_samples
    if count < 1 or count % samples_at_once:
        raise _bad(
            _SAMPLES,
            count,
            f"all data-parallel ranks together take {samples_at_once} at a time; give a multiple "
            "of that",
        )
    return evaluation.parse(args.critical_sharpness_eval_data)


def settings_of(args: Any) -> Settings:
    """The meter's settings from parsed arguments.

    Raises:
        InputError: a flag's value cannot be used. The message names flag, value, reason and remedy.
    """
    given = {name: getattr(args, _destination(flag)) for name, flag in FLAGS.items()}
    try:
        return Settings(**{**given, "parts": _parts(given["parts"])})
    except SettingError as error:
        raise as_flag(error) from None


def as_flag(error: SettingError) -> InputError:
    """The error of a setting that was given as a flag."""
    return _bad(FLAGS[error.name], error.value, error.reason)


def _parts(given: list[str] | None) -> str | dict[str, str] | None:
    """The value of the setting ``parts``."""
    if given is None or (len(given) == 1 and "=" not in given[0]):
        return given[0] if given else None
    parts: dict[str, str] = {}
    for text in given:
        name, equals, expression = text.partition("=")
        if not equals or name in parts:
            raise SettingError(
                "parts", text, "give one preset alone, or NAME=REGEX with a name of its own each"
            )
        parts[name] = expression
    return parts


def log_path(args: Any) -> Path | None:
    """Where the JSON lines go, or None where neither flag names a place."""
    if args.critical_sharpness_log:
        return Path(args.critical_sharpness_log)
    if args.tensorboard_dir:
        return Path(args.tensorboard_dir) / "critical_sharpness.jsonl"
    return None


def check_log_is_writable(args: Any, *, writer: int = -1) -> None:
    """Refuse a log that cannot be written, on the rank that will write it.

    Args:
        args: the parsed arguments, with ``rank`` and ``world_size``.
        writer: which rank writes; the last one, as in Megatron, by default.

    Raises:
        InputError: names the flag, the path, the reason and the remedy.
    """
    path = log_path(args)
    if path is None or args.rank != writer % args.world_size:
        return
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        flag = "--critical-sharpness-log" if args.critical_sharpness_log else "--tensorboard-dir"
        raise _bad(
            flag,
            str(path),
            f"the file cannot be written ({error.strerror}); name a file in a folder that rank "
            f"{args.rank} can write to",
        ) from error
    if not existed:
        os.unlink(path)


def _destination(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _bad(flag: str, value: object, reason: str) -> InputError:
    return InputError(f"{flag} {value}: {reason}.")
