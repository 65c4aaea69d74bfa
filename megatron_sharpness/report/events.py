"""Loss and learning rate from TensorBoard event files, whoever wrote them.

Megatron's tag is taken where it is there. Other trainers have no common one: ``train/loss``,
``Loss/train``, ``train_loss_step``; ``lr``, ``train/learning_rate``, ``lr-AdamW``. Of all tags that
say the loss, or the learning rate, and no word that another kind of number has, the one with the
fewest further words is taken; of these one that says training; of these the first in the alphabet.
Notes say what was taken, and what was not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.measurement import SNR_TAG, TAGS
from megatron_sharpness.report.records import Curve, Logged

EVENT_FILES = "events.out.tfevents.*"
TRAINING = {"train", "training", "step"}
OTHER_DATA = {"val", "valid", "validation", "eval", "evaluation", "test", "dev", "holdout"}
OTHER_NUMBERS = {
    *("critical", "vs", "max", "min", "std", "var", "scale", "scaler", "grad", "momentum"),
    *("z", "aux", "auxiliary", "balance", "balancing"),  # parts of a loss
}
SHOWN = 8  # tags that a message names at most


@dataclass(frozen=True)
class Quantity:
    """What is looked for among the tags.

    Attributes:
        field: what records call it.
        name: what readers call it.
        megatron: Megatron's tag.
        forms: the words that say it, one form or another.
    """

    field: str
    name: str
    megatron: str
    forms: tuple[str, ...]

    def choose(self, tags: Sequence[str]) -> list[str]:
        """The tags that say it, the one to take first."""
        return sorted(filter(self._is_said_by, tags), key=self._rank)

    def _is_said_by(self, tag: str) -> bool:
        words = _words(tag)
        said = any(f" {form} " in f" {' '.join(words)} " for form in self.forms)
        return said and not (OTHER_DATA | OTHER_NUMBERS) & set(words)

    def _rank(self, tag: str) -> tuple[bool, int, bool, str]:
        words = set(_words(tag))
        own = words - TRAINING - {word for form in self.forms for word in form.split()}
        return tag != self.megatron, len(own), not words & TRAINING, tag


QUANTITIES = (
    Quantity("loss", "loss", "lm loss", ("loss",)),
    Quantity("lr", "learning rate", "learning-rate", ("lr", "learning rate")),
)


def read_tensorboard(folder: Path) -> Logged:
    """Loss and learning rate from the event files in ``folder``, at least one of them.

    Raises:
        InputError: there is no such folder, event file or tag, or tensorboard is missing.
    """
    if not folder.is_dir():
        reason = "it is a file" if folder.exists() else "there is no such folder"
        raise _bad(folder, reason, "give the folder of the event files")
    if not any(folder.glob(EVENT_FILES)):
        inner = sorted({str(file.parent) for file in folder.rglob(EVENT_FILES)})
        raise _bad(
            folder,
            f"it holds no event file ({EVENT_FILES})",
            f"give one of its folders that do, {_some(inner)}" if inner else "give one that does",
        )
    events = _open(folder)
    logged = _logged(events)
    if not logged.curves:
        raise _bad(
            folder,
            "no tag of its event files says the loss or the learning rate of training "
            f"(there are {_some(_tags(events))})",
            "log them as train/loss and train/lr",
        )
    return logged


def read_tensorboard_beside(file: Path) -> Logged:
    """The same from event files in the folder of ``file``, as far as there are any.

    Raises:
        InputError: there are event files, and tensorboard is missing.
    """
    return _logged(_open(file.parent)) if any(file.parent.glob(EVENT_FILES)) else Logged()


def _bad(folder: Path, reason: str, remedy: str) -> InputError:
    return InputError(
        f"--tensorboard-dir {folder}: {reason}; {remedy}, or leave the flag away to draw loss and "
        "learning rate at the measurements"
    )


def _open(folder: Path) -> Any:
    """The event files of a folder, read."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise InputError(
            f"reading the event files in {folder} needs tensorboard ({error}); "
            "pip install tensorboard"
        ) from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def _tags(events: Any) -> list[str]:
    """All but those that the measurements themselves are written under."""
    tags = events.Tags()["scalars"]
    return sorted(tag for tag in tags if re.split(r"/| vs ", tag)[0] not in (*TAGS, SNR_TAG))


def _logged(events: Any) -> Logged:
    """The curves of the tags that are chosen; the notes say which, where one could ask."""
    curves, notes = {}, []
    for quantity in QUANTITIES:
        chosen = quantity.choose(_tags(events))
        if not chosen:
            if tags := _tags(events):
                notes.append(
                    f"{quantity.name}: at the measurements only, no tag of the event files says it "
                    f"(there are {_some(tags)})"
                )
            continue
        taken, *others = chosen
        values = {event.step: event.value for event in events.Scalars(taken)}
        steps = sorted(values)
        curves[quantity.field] = Curve(
            np.array(steps, dtype=float), np.array([values[step] for step in steps])
        )
        if taken != quantity.megatron:
            left = f", not {_some(others)}" if others else ""
            notes.append(f"{quantity.name} of every logged iteration: the tag {taken}{left}")
    return Logged(curves, notes)


def _some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*names[:SHOWN], *more]) or "none"


def _words(tag: str) -> list[str]:
    """The words of a tag: ``lr-AdamW`` and ``trainLoss`` have several."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", tag)]
