"""``megatron-sharpness report``: the measurements of runs as a table, as curves and as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.measurement import PART, TRAIN
from megatron_sharpness.report.events import read_tensorboard, read_tensorboard_beside
from megatron_sharpness.report.parts import format_parts
from megatron_sharpness.report.records import (
    Logged,
    Run,
    read_batches,
    read_training_log,
    records_file,
    run_name,
)
from megatron_sharpness.report.second_moments import format_moments
from megatron_sharpness.report.table import format_runs, format_status, format_table
from megatron_sharpness.report.verdict import verdict_of

SUFFIXES = (".png", ".html")
#: So many measurements of one run are printed.
LAST = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``megatron-sharpness report``."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="JSON lines of a run, or its folder with critical_sharpness.jsonl, there or in its "
        "folder tensorboard; of a folder, loss and learning rate of every iteration are read from "
        "TensorBoard event files beside it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="write a figure (.png) or a page to open in a browser (.html); may be given again",
    )
    every_iteration = parser.add_mutually_exclusive_group()
    every_iteration.add_argument(
        "--tensorboard-dir",
        type=Path,
        metavar="DIR",
        help="one run: draw loss and learning rate at every logged iteration, from these "
        "TensorBoard event files: Megatron's tags, or such as train/loss, Loss/train, lr, "
        "train/learning_rate",
    )
    every_iteration.add_argument(
        "--train-log",
        type=Path,
        metavar="FILE",
        help="one run: draw loss and learning rate at every logged iteration, from what Megatron "
        "or launch/fsdp/train.py printed",
    )
    parser.add_argument(
        "--preconditioned",
        action="store_true",
        help="several runs: draw the edge of stability of the pre-conditioned Hessian too",
    )
    parser.add_argument(
        "--last",
        type=int,
        metavar="N",
        help=f"print the last N measurements (default: {LAST} of one run, none of several)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the tables and write what every ``--out`` asks for.

    Raises:
        InputError: a flag or a file that cannot be used.
    """
    _check(arguments)
    runs = _read_runs(arguments)
    for path in arguments.out:
        if path.suffix == ".png":
            from megatron_sharpness.report.figure import draw

            draw(runs, path, preconditioned=arguments.preconditioned)
        else:
            from megatron_sharpness.report.page import write

            write(runs, path, preconditioned=arguments.preconditioned)

    if len(runs) > 1:
        print(format_runs(runs))
        print("".join(f"{run.name}: {note}\n" for run in runs for note in run.logged.notes))
    for each in runs if len(runs) == 1 or arguments.last is not None else ():
        if len(runs) > 1:
            print(each.name)
        print(format_table(each.records[-(arguments.last or LAST) :]))
        print(format_status(each), verdict_of(each), sep="\n")
        if each.parts:
            print(format_parts(each))
        if moments := format_moments(each):
            print(moments)
        if len(runs) == 1:
            print(*each.logged.notes, sep="\n")
        print()
    for path in arguments.out:
        print(path)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read."""
    if arguments.last is not None and arguments.last < 1:
        raise InputError(f"--last {arguments.last}: must be at least 1")
    for path in arguments.out:
        if path.suffix not in SUFFIXES:
            raise InputError(
                f"--out {path}: cannot be written, since its suffix says what to write; end it on "
                ".png for a figure or .html for a page"
            )
    if len(arguments.runs) > 1:
        for flag in ("--tensorboard-dir", "--train-log"):
            value = getattr(arguments, flag[2:].replace("-", "_"))
            if value is not None:
                raise InputError(
                    f"{flag} {value}: belongs to one run, and {len(arguments.runs)} are given; "
                    "leave it away and give each RUN as the folder that holds its JSON lines and "
                    "TensorBoard event files"
                )


def _read_runs(arguments: argparse.Namespace) -> list[Run]:
    names = [run_name(path) for path in arguments.runs]
    if len(set(names)) < len(names):  # folders of the same name: call them as they were given
        names = [str(path) for path in arguments.runs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"RUN {name}: given {names.count(name)} times; give each run once")
    runs = []
    for name, path in zip(names, arguments.runs, strict=True):
        file, logged, notes = records_file(path), Logged(), list[str]()
        others = read_batches(file, notes)
        records = others.pop(TRAIN)
        names = [name for name in others if name.startswith(PART)]
        parts = {name.removeprefix(PART): others.pop(name) for name in names}
        if arguments.tensorboard_dir is not None:
            logged = read_tensorboard(arguments.tensorboard_dir)
        elif arguments.train_log is not None:
            logged = read_training_log(arguments.train_log)
        elif path.is_dir() and arguments.out:  # else nothing is drawn, and they may be large
            logged = read_tensorboard_beside(file)
        logged.notes.extend(notes)
        runs.append(Run(name, records, logged, others, parts))
    return runs
