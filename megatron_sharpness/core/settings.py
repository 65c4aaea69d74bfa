"""What a user chooses about a measurement, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from megatron_sharpness.core.alarm import Alarm
from megatron_sharpness.core.errors import SettingError
from megatron_sharpness.core.measurement import TRAIN
from megatron_sharpness.core.parts import check_parts
from megatron_sharpness.core.search import Method


@dataclass(frozen=True)
class Settings:
    """What to measure with.

    Attributes:
        every: interval in iterations; 0 is off.
        method: line search: ``certified`` or the paper's ``bisection``.
        tolerance: width |1 − lower/upper| of the bracket to reach, in (0, 1); 1/4 for
            ``certified``, which interpolates η_c in it, and 1/16 for ``bisection`` if None.
        initial_guess: learning rate at which the very first search starts; the step's own if None.
        max_evaluations: most forward passes that one search may spend.
        on_error: what a failed measurement does to the run.
        watch: which measurements are watched, whether they leave everything that training reads
            later as it was: the ``first`` of a run, or ``always``.
        parts: which parts of the model are measured by themselves, too: ``modules``, ``groups`` or
            ``layers``, or regular expressions of parameters' names, by name of the part
            (:mod:`megatron_sharpness.core.parts`).
        parts_every: their interval in iterations, a multiple of ``every``; that itself if None.
        adam_snr: whether the signal-to-noise ratios of Adam's second moments are measured, too
            (:mod:`megatron_sharpness.core.second_moments`).
        alarm: η/η_c above which the alarm rings; None never.
        alarm_after: how many measurements in a row it takes to begin, and to end.
        alarm_every: interval in iterations while it rings; ``every`` if None.
        on_alarm: called with the :class:`~megatron_sharpness.core.alarm.Alarm` that begins or ends,
            on all ranks alike.

    Raises:
        SettingError: a value cannot be used; the message names it, the reason and the remedy.
    """

    every: int = 100
    method: Method = "certified"
    tolerance: float | None = None
    initial_guess: float | None = None
    max_evaluations: int = 40
    on_error: Literal["warn", "raise"] = "warn"
    watch: Literal["first", "always"] = "first"
    parts: str | Mapping[str, str] | None = None
    parts_every: int | None = None
    adam_snr: bool = False
    alarm: float | None = None
    alarm_after: int = 2
    alarm_every: int | None = None
    on_alarm: Callable[[Alarm], object] | None = None

    def __post_init__(self) -> None:
        if not _is_count(self.every) or self.every < 0:
            raise SettingError(
                "every",
                self.every,
                "an interval is a positive whole number; give 100, or 0 to switch it off",
            )
        if self.method not in get_args(Method):
            raise SettingError(
                "method",
                self.method,
                f"no such line search; give one of {', '.join(map(repr, get_args(Method)))}",
            )
        if self.tolerance is not None and not 0.0 < self.tolerance < 1.0:
            raise SettingError(
                "tolerance",
                self.tolerance,
                "a relative width lies between 0 and 1; give 0.25, or leave it out",
            )
        if self.initial_guess is not None and not 0.0 < self.initial_guess < math.inf:
            raise SettingError(
                "initial_guess",
                self.initial_guess,
                "a learning rate to start from is positive and finite; leave it out to start from "
                "the step's own",
            )
        if not _is_count(self.max_evaluations) or self.max_evaluations < 1:
            raise SettingError(
                "max_evaluations",
                self.max_evaluations,
                "a search needs forward passes; give 40, the default, or leave it out",
            )
        if self.on_error not in ("warn", "raise"):
            raise SettingError("on_error", self.on_error, "give 'warn', to train on, or 'raise'")
        if self.watch not in ("first", "always"):
            raise SettingError("watch", self.watch, "give 'first' or 'always'")
        if not isinstance(self.adam_snr, bool):
            raise SettingError("adam_snr", self.adam_snr, "give True, or leave it out")
        if self.adam_snr and not self.every:
            raise SettingError(
                "adam_snr",
                self.adam_snr,
                "it is measured where critical sharpness is, which is off; give an interval",
            )
        self._check_parts()
        self._check_alarm()

    def _check_parts(self) -> None:
        if self.parts is not None:
            check_parts(self.parts)
        interval = self.parts_every
        if interval is None:
            return
        if self.parts is None:
            raise SettingError(
                "parts_every", interval, "there are no parts; give parts, or leave this out"
            )
        if not _is_count(interval) or interval < 1 or interval % max(1, self.every):
            raise SettingError(
                "parts_every",
                interval,
                f"an interval in iterations, and a multiple of the {self.every} between "
                f"measurements; give {10 * self.every}, or leave it out",
            )

    def _check_alarm(self) -> None:
        if self.alarm is not None and not 0.0 < self.alarm < math.inf:
            raise SettingError(
                "alarm",
                self.alarm,
                "it is a learning rate over the critical one, and positive; give 1, above which a "
                "step raises the loss of its own batch, or leave it out",
            )
        if not _is_count(self.alarm_after) or self.alarm_after < 1:
            raise SettingError(
                "alarm_after", self.alarm_after, "a number of measurements in a row; give 1 or more"
            )
        closer = self.alarm_every
        if closer is not None and (not _is_count(closer) or not 1 <= closer <= self.every):
            raise SettingError(
                "alarm_every",
                closer,
                "an interval in iterations that is no longer than the one between measurements "
                f"without alarm, {self.every}; give a part of that, or leave it out",
            )
        for name in ("alarm_every", "on_alarm"):
            if self.alarm is None and (value := getattr(self, name)) is not None:
                raise SettingError(
                    name, value, "there is no alarm; give alarm, say 1, or leave this out"
                )
        if self.on_alarm is not None and not callable(self.on_alarm):
            raise SettingError("on_alarm", self.on_alarm, "give a function of one argument")

    @classmethod
    def of(cls, owner: object, **given: Any) -> Settings:
        """The settings that ``owner`` was given by name.

        Raises:
            TypeError: there is no such setting.
            SettingError: a value cannot be used.
        """
        names = [field.name for field in fields(cls)]
        for unknown in sorted(given.keys() - set(names)):
            raise TypeError(
                f"{type(owner).__name__} has no argument {unknown!r}; beside those of its own it "
                f"takes {', '.join(names)}"
            )
        return cls(**given)

    def due_parts(self, iteration: int) -> bool:
        """Whether the parts are measured, too, at an iteration that is measured."""
        if self.parts is None or not self.every:
            return False
        return iteration % (self.parts_every or self.every) == 0

    def due(self, iteration: int, *, alarmed: bool = False) -> bool:
        """Whether the interval divides ``iteration``, or the closer one of an alarm."""
        if not self.every:
            return False
        closer = alarmed and self.alarm_every is not None and iteration % self.alarm_every == 0
        return closer or iteration % self.every == 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_names(names: Iterable[str]) -> None:
    """Refuse names of losses that no tag can have.

    Raises:
        SettingError: names the name, the reason and the remedy.
    """
    for name in names:
        if not isinstance(name, str) or name == TRAIN or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise SettingError(
                "losses",
                name,
                "a name is a tag's last part, and 'train' is the step's own batch; give one of "
                "letters, digits, '_', '.' and '-'",
            )


def check_sinks(sinks: Iterable[object]) -> None:
    """Refuse what no record can be written to.

    Raises:
        SettingError: names it, the reason and the remedy.
    """
    if not isinstance(sinks, Iterable):
        raise SettingError("sinks", sinks, "give a list of them")
    for sink in sinks:
        if not callable(getattr(sink, "write", None)):
            raise SettingError("sinks", sink, "it has no method write(measurement)")
