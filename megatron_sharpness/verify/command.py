"""``megatron-sharpness verify``: the promises proved with a training command of one's own."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sharpness.core.errors import InputError

if TYPE_CHECKING:
    from megatron_sharpness.core.trial import Trial


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "training", nargs="+", metavar="-- COMMAND", help="what trains: torchrun … with its flags"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER",
        help="of the page, the JSON and the logs; all nodes must see it",
    )  # fmt: skip
    parser.add_argument(
        "--iterations", type=int, default=12, metavar="N",
        help="that each of the three runs makes, from scratch or from the command's --load "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--every", type=int, default=3, metavar="N",
        help="iterations between the measurements of the third (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=1800.0, metavar="S",
        help="seconds after which an iteration counts as hung, the first with all before it "
        "(default: %(default)g)",
    )  # fmt: skip
    parser.epilog = (
        "The exit status is 0 if all promises hold, 1 if one does not, and 2 if it could not be "
        "told. Nothing is saved but in FOLDER."
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command three times and compare."""
    from megatron_sharpness.verify import runs

    try:
        if not arguments.timeout > 0:
            raise InputError(f"--timeout {arguments.timeout}: seconds; give a positive number")
        trials = runs.trials(arguments.out, arguments.iterations, arguments.every)
        existed = runs.begin(arguments.out)
        try:
            for name, trial in trials.items():
                _train(name, trial, arguments.training, arguments.timeout)
            verification = runs.judge(arguments.out, trials, arguments.training)
            runs.write(arguments.out, verification)
        except KeyboardInterrupt:
            for trial in trials.values():
                shutil.rmtree(trial.folder, ignore_errors=True)
            if not existed:
                shutil.rmtree(arguments.out, ignore_errors=True)
            raise
    except InputError as error:
        print(f"megatron-sharpness verify: error: {error}", file=sys.stderr)
        return 2
    print(verification)
    print(f"{arguments.out / 'verify.md'} says it in full")
    return verification.status


def _train(name: str, trial: Trial, command: list[str], timeout: float) -> None:
    """One of the runs.

    Raises:
        InputError: it failed, hung, or has written nothing down.
    """
    from megatron_sharpness.processes import end_of, run_command
    from megatron_sharpness.verify.runs import RUNS
    from megatron_sharpness.verify.traces import iterations_done

    trial.folder.mkdir()
    folder, log, shown = trial.folder.resolve(), trial.folder / "log.txt", RUNS[name][1]
    began = since = time.monotonic()
    done = 0

    def progress() -> str:
        nonlocal done, since
        if (now := iterations_done(folder)) != done:
            done, since = now, time.monotonic()
        if time.monotonic() - since > timeout:
            raise InputError(
                f"the training command {shown} made no iteration for {timeout:g} s after {done} "
                f"(--timeout). {end_of(log)}"
            )
        return f"{shown}: {done} of {trial.iterations} iterations"

    environment = replace(trial, folder=folder).environment()
    code = run_command(command, log, progress, {**environment, "WANDB_MODE": "disabled"})
    done = iterations_done(folder)
    print(f"{shown}: {done} iterations in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if code:
        raise InputError(
            f"the training command {shown} ended with {code} after {done} iterations. "
            f"{end_of(log)}"
        )
    if not done:
        raise InputError(
            "the training command has written nothing down: it has to start Megatron through "
            "`-m megatron_sharpness.megatron` or a patched checkout, Bridge with the callback, or "
            "launch/fsdp/train.py, and hand its environment to all processes (mpirun -x "
            f"CRITICAL_SHARPNESS_TRIAL, srun --export=ALL). {end_of(log)}"
        )
