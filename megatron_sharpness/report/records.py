"""Reading what a run has written: our JSON lines and Megatron's own logs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sharpness.errors import InputError

Record = dict[str, Any]  # one measurement, by the names of measurement.py
Array = NDArray[np.float64]


@dataclass(frozen=True)
class TrainingCurves:
    """Loss and learning rate as Megatron logged them, one value a logged iteration."""

    iteration: Array
    loss: Array
    lr: Array


def column(records: list[Record], name: str) -> Array:
    """The field ``name`` of every record, NaN where it is missing or null."""
    values = [record.get(name) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def read_records(path: Path) -> list[Record]:
    """The measurements on the training batch, by iteration.

    Where a resumed run has measured an iteration again, the later measurement stands.

    Raises:
        InputError: no such file, a line that is no record, or no measurement at all.
    """
    by_iteration: dict[int, Record] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record.get("batch", "train") == "train":
                by_iteration[int(record["iteration"])] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number}: not a measurement ({error!r}); a line cut short by a "
                "killed run can be deleted"
            ) from error
    if not by_iteration:
        raise InputError(
            f"{path}: holds no measurement; was --measure-critical-sharpness-every "
            "larger than the number of iterations?"
        )
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


_LOG_LINE = re.compile(
    r"iteration\s+(?P<iteration>\d+)/.*?learning rate:\s*(?P<lr>\S+).*?lm loss:\s*(?P<loss>\S+)"
)


def read_training_log(path: Path) -> TrainingCurves:
    """Loss and learning rate from the lines that Megatron prints.

    Raises:
        InputError: no such file, or none of its lines reports an iteration.
    """
    rows = {
        int(match["iteration"]): (float(match["loss"]), float(match["lr"]))
        for match in map(_LOG_LINE.search, _read_text(path).splitlines())
        if match
    }
    if not rows:
        raise InputError(f"--train-log {path}: no line of it reports an iteration and its lm loss")
    iterations = sorted(rows)
    loss, lr = zip(*(rows[iteration] for iteration in iterations), strict=True)
    return TrainingCurves(np.array(iterations, float), np.array(loss), np.array(lr))


def read_tensorboard(folder: Path) -> TrainingCurves:
    """Loss and learning rate from the event files that Megatron writes.

    Raises:
        InputError: no event file with both, or tensorboard is missing.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise InputError(
            f"--tensorboard-dir needs tensorboard ({error}); "
            "pip install tensorboard"
        ) from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    try:
        loss = {event.step: event.value for event in events.Scalars("lm loss")}
        lr = {event.step: event.value for event in events.Scalars("learning-rate")}
    except KeyError as error:
        raise InputError(
            f"--tensorboard-dir {folder}: no event file in it has Megatron's {error.args[0]}"
        ) from error
    iterations = sorted(loss.keys() & lr.keys())
    return TrainingCurves(
        np.array(iterations, float),
        np.array([loss[iteration] for iteration in iterations]),
        np.array([lr[iteration] for iteration in iterations]),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
