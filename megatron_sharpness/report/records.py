"""Reading what a run has written: our JSON lines and Megatron's own logs."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.measurement import STATUSES, TRAIN

Record = dict[str, Any]  # one measurement, by the names of measurement.py
Array = NDArray[np.float64]

LOG_NAME = "critical_sharpness.jsonl"
EVENT_FILES = "events.out.tfevents.*"
LOSS_TAG, LR_TAG = "lm loss", "learning-rate"


@dataclass(frozen=True)
class TrainingCurves:
    """Loss and learning rate as Megatron logged them, one value a logged iteration."""

    iteration: Array
    loss: Array
    lr: Array


@dataclass(frozen=True)
class Run:
    """One run of the report.

    Attributes:
        name: what it is called in tables and legends.
        records: its measurements by iteration, as :func:`read_records` returns them.
        logged: loss and learning rate at every logged iteration, where they are known.
        others: the measurements on other data, by its name.
    """

    name: str
    records: list[Record]
    logged: TrainingCurves | None = None
    others: dict[str, list[Record]] = field(default_factory=dict)

    @cached_property
    def training(self) -> TrainingCurves:
        """Loss and learning rate as densely as they are known: at the measurements, if no more."""
        return self.logged or TrainingCurves(
            self.column("iteration"), self.column("loss"), self.column("lr")
        )

    @cached_property
    def statuses(self) -> dict[str, int]:
        """How often each status was the ending: ``found`` first, zero or not, and what came up."""
        counts = Counter(record["status"] for record in self.records)
        return {"found": counts["found"], **counts}

    def column(self, name: str) -> Array:
        """The field ``name`` of every record, NaN where it is missing or null."""
        return column(self.records, name)


def column(records: list[Record], name: str) -> Array:
    """The field ``name`` of every record, NaN where it is missing or null."""
    values = [record.get(name) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def records_file(run: Path) -> Path:
    """The JSON lines of ``run``: the file itself, or in that folder or its folder tensorboard.

    Raises:
        InputError: a folder that has none.
    """
    if not run.is_dir():
        return run
    for folder in (run, run / "tensorboard"):
        if (folder / LOG_NAME).is_file():
            return folder / LOG_NAME
    raise InputError(
        f"RUN {run}: no {LOG_NAME} in this folder or in its folder tensorboard; give the folder "
        "of --tensorboard-dir, or the file of JSON lines itself"
    )


def run_name(run: Path) -> str:
    """What to call ``run``: its folder where its files have the usual names, else the file."""
    file = records_file(run).resolve()
    if file.name != LOG_NAME:
        return file.stem
    return file.parent.parent.name if file.parent.name == "tensorboard" else file.parent.name


def read_records(path: Path) -> list[Record]:
    """The measurements on the training batch, as :func:`read_batches` reads them."""
    return read_batches(path)[TRAIN]


def read_batches(path: Path) -> dict[str, list[Record]]:
    """The measurements on the training batch, ``train``, and on other data, each by iteration.

    Where a resumed run has measured an iteration again, the later measurement stands.

    Raises:
        InputError: no such file, a line that is no record, or no measurement at all.
    """
    found: dict[str, dict[int, Record]] = {TRAIN: {}}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record["status"] not in STATUSES:
                raise ValueError(f"status {record['status']!r}")
            of_batch = found.setdefault(record.get("batch", TRAIN), {})
            of_batch[int(record["iteration"])] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number}: not a measurement ({error!r}); a line cut short by a "
                "killed run can be deleted"
            ) from error
    if not found[TRAIN]:
        raise InputError(
            f"{path}: holds no measurement; was --measure-critical-sharpness-every "
            "larger than the number of iterations?"
        )
    return {
        batch: [records[iteration] for iteration in sorted(records)]
        for batch, records in found.items()
    }


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
    curves = _scan_tensorboard(folder)
    if curves is None:
        raise InputError(
            f"--tensorboard-dir {folder}: no event file in it has Megatron's {LOSS_TAG} and "
            f"{LR_TAG}; leave the flag away to draw both at the measurements"
        )
    return curves


def read_tensorboard_beside(file: Path) -> TrainingCurves | None:
    """The same from event files in the folder of ``file``; ``None`` where they have no such tags.

    Raises:
        InputError: there are event files, and tensorboard is missing.
    """
    return _scan_tensorboard(file.parent) if any(file.parent.glob(EVENT_FILES)) else None


def _scan_tensorboard(folder: Path) -> TrainingCurves | None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise InputError(
            f"reading the event files in {folder} needs tensorboard ({error}); "
            "pip install tensorboard"
        ) from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if not {LOSS_TAG, LR_TAG} <= set(events.Tags()["scalars"]):
        return None
    loss = {event.step: event.value for event in events.Scalars(LOSS_TAG)}
    lr = {event.step: event.value for event in events.Scalars(LR_TAG)}
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
