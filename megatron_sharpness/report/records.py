"""Reading what a run has written: our JSON lines, and what Megatron prints."""

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
from megatron_sharpness.core.measurement import STATUSES, TRAIN, name_of

Record = dict[str, Any]  # one measurement, by the names of measurement.py
Array = NDArray[np.float64]

#: Fields that are drawn and told.
NUMBERS = (
    "lr", "loss", "critical_lr", "critical_lr_lower", "critical_lr_upper", "critical_sharpness",
    "directional_sharpness", "edge_of_stability", "edge_of_stability_preconditioned",
    "lr_over_critical", "evaluations", "seconds", "tokens",
)  # fmt: skip
LOG_NAME = "critical_sharpness.jsonl"
#: Where the measurements of a run are, for who names another place.
WHERE = (
    f"give the file of JSON lines, or the folder that holds it as {LOG_NAME}: what "
    "--critical-sharpness-log or --tensorboard-dir named in training, or in Python a "
    f'JsonLinesSink("FOLDER/{LOG_NAME}") in sinks='
)


#: What a line begins with, the first field of a measurement; and so one that is cut short.
_BEGIN = '{"iter'


@dataclass(frozen=True)
class Curve:
    """Values, and the iterations that they are of, ascending."""

    iteration: Array
    values: Array


@dataclass(frozen=True)
class Logged:
    """What training itself has logged.

    Attributes:
        curves: the loss, ``loss``, and the learning rate, ``lr``, as far as they are there.
        notes: what to tell of where they come from.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One run of the report.

    Attributes:
        name: what it is called in tables and legends.
        records: its measurements by iteration, as :func:`read_records` returns them.
        logged: loss and learning rate at every logged iteration, where they are known.
        others: the measurements on other data, by its name.
        parts: the measurements of the updates of parts of the model, by their names.
    """

    name: str
    records: list[Record]
    logged: Logged = field(default_factory=Logged)
    others: dict[str, list[Record]] = field(default_factory=dict)
    parts: dict[str, list[Record]] = field(default_factory=dict)

    def curve(self, name: str) -> Curve:
        """``loss`` or ``lr`` as densely as it is known: at the measurements, if no more."""
        at_measurements = Curve(self.column("iteration"), self.column(name))
        return self.logged.curves.get(name, at_measurements)

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
        InputError: it is not there, or a folder that has none.
    """
    if not run.exists():
        raise InputError(f"RUN {run}: no such file or folder; {WHERE}")
    if not run.is_dir():
        return run
    for folder in (run, run / "tensorboard"):
        if (folder / LOG_NAME).is_file():
            return folder / LOG_NAME
    raise InputError(
        f"RUN {run}: no {LOG_NAME} in this folder or in its folder tensorboard; {WHERE}"
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


def read_batches(path: Path, notes: list[str] | None = None) -> dict[str, list[Record]]:
    """The measurements on the training batch, ``train``, on other data, and of parts of the model,
    each by iteration, under the names that :attr:`Measurement.name` has.

    Where a run went back to an earlier iteration, as one does that is resumed or begun anew, what
    was measured from there on before is left out, and so is a line that a killed run or a full disk
    has cut short.

    Args:
        path: of the JSON lines.
        notes: told of lines that are cut short.

    Raises:
        InputError: no such file, a line that is no record, or no measurement at all.
    """
    found: dict[str, list[Record]] = {TRAIN: []}
    for number, line in enumerate(_read_text(path, f"RUN {path}").splitlines(), start=1):
        if not line.strip():
            continue
        if line.startswith(_BEGIN) and not line.rstrip().endswith("}"):
            if notes is not None:
                notes.append(
                    f"line {number} of {path} is cut short, by a killed run or a full disk; it is "
                    "left out"
                )
            continue
        try:
            record = _parse(line)
        except ValueError as error:
            raise InputError(
                f"RUN {path}, line {number}: not a measurement ({error}); {WHERE}"
            ) from None
        name = name_of(record.get("batch", TRAIN), record.get("part"))
        own = found.setdefault(name, [])
        for kept in found.values() if name == TRAIN else [own]:
            while kept and kept[-1]["iteration"] > record["iteration"]:
                kept.pop()
        if own and own[-1]["iteration"] == record["iteration"]:
            own.pop()
        own.append(record)
    if not found[TRAIN]:
        raise InputError(
            f"RUN {path}: holds no measurement; train for more iterations, or measure more often: "
            "--measure-critical-sharpness-every, or every= in Python"
        )
    return found


def _parse(line: str) -> Record:
    """The measurement in a line.

    Raises:
        ValueError: says what is wrong with it.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError("no JSON") from None
    if not isinstance(record, dict):
        raise ValueError("JSON, but no object")
    if record.get("status") not in STATUSES:
        raise ValueError(f"status {record.get('status')!r}")
    if not isinstance(record.get("iteration"), int):
        raise ValueError(f"iteration {record.get('iteration')!r}")
    for name in NUMBERS:
        if not isinstance(record.get(name), int | float | None):
            raise ValueError(f"{name} {record[name]!r}")
    return record


_LOG_LINE = re.compile(
    r"iteration\s+(?P<iteration>\d+)/.*?learning rate:\s*(?P<lr>\S+).*?lm loss:\s*(?P<loss>\S+)"
)


def read_training_log(path: Path) -> Logged:
    """Loss and learning rate from the lines that Megatron and ``launch/fsdp/train.py`` print.

    Raises:
        InputError: no such file, or none of its lines reports an iteration.
    """
    rows = {
        int(match["iteration"]): (float(match["loss"]), float(match["lr"]))
        for match in map(_LOG_LINE.search, _read_text(path, f"--train-log {path}").splitlines())
        if match
    }
    if not rows:
        raise InputError(
            f"--train-log {path}: no line of it reports an iteration and its lm loss, as Megatron "
            "and launch/fsdp/train.py print them; give their output, or of other training the "
            "event files by --tensorboard-dir"
        )
    iterations = sorted(rows)
    loss, lr = zip(*(rows[iteration] for iteration in iterations), strict=True)
    at = np.array(iterations, dtype=float)
    return Logged({"loss": Curve(at, np.array(loss)), "lr": Curve(at, np.array(lr))})


def _read_text(path: Path, shown: str) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"{shown}: cannot be read ({error.strerror}); give a file that can"
        ) from error
