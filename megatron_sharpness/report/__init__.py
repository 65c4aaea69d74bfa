"""``megatron-sharpness report``: the measurements of a run as a table and as curves."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sharpness.errors import InputError
from megatron_sharpness.report.records import read_records, read_tensorboard, read_training_log
from megatron_sharpness.report.table import format_table

__all__ = ["add_arguments", "format_table", "read_records", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``megatron-sharpness report``."""
    parser.add_argument(
        "records", type=Path, metavar="JSONL", help="critical_sharpness.jsonl of a run"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw the curves into this file")
    every_iteration = parser.add_mutually_exclusive_group()
    every_iteration.add_argument(
        "--tensorboard-dir",
        type=Path,
        metavar="DIR",
        help="draw loss and learning rate at every logged iteration, from Megatron's TensorBoard",
    )
    every_iteration.add_argument(
        "--train-log",
        type=Path,
        metavar="FILE",
        help="draw loss and learning rate at every logged iteration, from Megatron's output",
    )
    parser.add_argument(
        "--last",
        type=int,
        default=10,
        metavar="N",
        help="print the last N measurements (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the table and, with ``--out``, draw the figure."""
    if arguments.last < 1:
        raise InputError(f"--last {arguments.last}: must be at least 1")
    records = read_records(arguments.records)
    if arguments.out is not None:
        from megatron_sharpness.report.figure import draw

        training = None
        if arguments.tensorboard_dir is not None:
            training = read_tensorboard(arguments.tensorboard_dir)
        elif arguments.train_log is not None:
            training = read_training_log(arguments.train_log)
        draw(records, arguments.out, training)
    print(format_table(records[-arguments.last :]))
    if arguments.out is not None:
        print(f"\n{arguments.out}: {len(records)} measurements")
