"""Runs of a training command that measure and train nothing: what the sweeps are made of.

The command is Megatron's or ``launch/fsdp/train.py``'s, with whatever launcher, model and parallel
layout; what differs from a training run are flags that are added.
"""

from __future__ import annotations

import argparse
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sharpness.core.errors import InputError, flag_of
from megatron_sharpness.data import evaluation
from megatron_sharpness.processes import end_of, run_command

#: What :class:`~megatron_sharpness.core.frozen.FrozenRun` says at the end of a run.
REPORT = re.compile(
    r"frozen: parameters and buffers are what they were, sha256 (?P<sha256>[0-9a-f]{64}) \| "
    r"steps and measurements took (?P<seconds>[\d.]+) s \| "
    r"peak memory of a process: (?P<memory>[\d.]+) MiB"
)


def add_arguments(parser: argparse.ArgumentParser, *, eval_data: bool = False) -> None:
    """The arguments that all sweeps have, those of :class:`Frozen` but for ``--accumulate``.

    Args:
        parser: of the sweep.
        eval_data: whether there is no sweep without other data.
    """
    parser.fromfile_prefix_chars = "@"
    parser.convert_arg_line_to_args = (  # type: ignore[method-assign]
        lambda arg_line: shlex.split(arg_line, comments=True)
    )
    parser.epilog = "@FILE reads flags from a file, as there are in configs/."
    parser.add_argument(
        "training", nargs="+", metavar="-- COMMAND", help="what trains: torchrun … with its flags"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the results")
    parser.add_argument(
        "--measure",
        type=int,
        default=100,
        metavar="M",
        help="steps that are measured, each with a batch of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--eval-data",
        nargs="+",
        default=[],
        required=eval_data,
        metavar="NAME=PREFIX",
        help="other data to measure too, as --critical-sharpness-eval-data takes them",
    )
    parser.add_argument(
        "--eval-samples", type=int, metavar="N", help="of each (default: --global-batch-size)"
    )


def check(arguments: argparse.Namespace, forbidden: Sequence[str]) -> None:
    """Refuse what can be refused of these before anything runs.

    Args:
        arguments: parsed.
        forbidden: flags of the training command that the sweep gives itself.

    Raises:
        InputError: names the flag, the value, the reason and the remedy.
    """
    for name in ("measure", "eval_samples"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(
                f"{flag_of(name)} {value}: a number of steps or samples; give 1 or more"
            )
    try:
        evaluation.parse(arguments.eval_data)
    except InputError as error:
        raise InputError(str(error).replace(evaluation.FLAG, "--eval-data")) from None
    for flag in ("--save", "--train-samples", *forbidden):
        if any(re.fullmatch(rf"{flag}(=.*)?", word) for word in arguments.training):
            raise InputError(
                f"{flag} in the training command: the sweep gives or forbids it; leave it out"
            )


class RunFailed(InputError):
    """A run of the training command ended without what was asked of it."""


@dataclass(frozen=True)
class Frozen:
    """What each run of a sweep does.

    Attributes:
        training: the command that would train.
        accumulate: steps that are for the optimizer's moments alone.
        measure: steps after them, each of which is measured.
        eval_data: ``NAME=PREFIX`` of other data.
        eval_samples: samples of each; None for the command's own.
    """

    training: Sequence[str]
    accumulate: int
    measure: int
    eval_data: Sequence[str] = ()
    eval_samples: int | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace, accumulate: int) -> Frozen:
        """From what :func:`add_arguments` has added."""
        return cls(
            training=arguments.training,
            accumulate=accumulate,
            measure=arguments.measure,
            eval_data=arguments.eval_data,
            eval_samples=arguments.eval_samples,
        )

    def run(self, flags: Sequence[str], records: Path, shown: str, *, begin: int = 0) -> Report:
        """One run of the training command; its records are there when it is over.

        Args:
            flags: to be added to the command.
            records: where its records are to be; the log lies beside them.
            shown: what progress is shown of.
            begin: the iteration that it goes on from, with that iteration's data.

        Raises:
            RunFailed: the command failed, or left fewer records than it should.
            InputError: there is no such command.
        """
        partial, log = records.with_suffix(".partial"), records.with_suffix(".log")
        partial.unlink(missing_ok=True)
        first = begin + self.accumulate
        last = first + self.measure
        command = [
            *self.training,
            *flags,
            *self._until(last, keep=begin > 0),
            *("--lr-decay-style", "constant", "--lr-warmup-iters", "0"),
            *("--measure-critical-sharpness-every", "1"),
            *("--critical-sharpness-frozen", str(first)),
            *("--critical-sharpness-log", str(partial)),
            *((evaluation.FLAG, *self.eval_data) if self.eval_data else ()),
        ]
        if self.eval_samples:
            command += ["--critical-sharpness-eval-samples", str(self.eval_samples)]
        began = time.monotonic()
        code = run_command(
            command, log, lambda: f"{shown}: {self._done(partial)} of {self.measure} batches"
        )
        seconds = time.monotonic() - began
        text = log.read_text(errors="replace")
        report = REPORT.search(text)
        if code or report is None or self._done(partial) < self.measure:
            raise RunFailed(
                f"the training command ended with {code} and {self._done(partial)} of "
                f"{self.measure} batches measured. {end_of(log)}\n"
            )
        partial.rename(records)
        return Report(report["sha256"], seconds, float(report["seconds"]), float(report["memory"]))

    def _until(self, last: int, *, keep: bool) -> list[str]:
        """Flags that end a run with an iteration."""
        given = re.search(r"--train-iters[ =](\d+)", " ".join(self.training))
        if keep and given and last <= int(given[1]):
            # The order of Megatron's data depends on --train-iters.
            return ["--exit-interval", str(last)]
        return ["--train-iters", str(last)]

    def _done(self, partial: Path) -> int:
        """Batches that are measured."""
        found = partial.read_text().count("\n") if partial.exists() else 0
        return found // (1 + len(self.eval_data))


@dataclass(frozen=True)
class Report:
    """What a frozen run says of itself.

    Attributes:
        sha256: of parameters and buffers, before and after.
        seconds: of the whole command.
        working: seconds of its steps and measurements.
        memory: largest peak of a process, in MiB.
    """

    sha256: str
    seconds: float
    working: float
    memory: float
