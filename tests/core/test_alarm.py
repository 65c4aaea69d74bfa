"""The alarm: when it begins and ends, who hears of it, and that it looks closer meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_sharpness.core.alarm import Alarm
from megatron_sharpness.core.errors import SettingError
from megatron_sharpness.core.measurement import Measurement, Records
from megatron_sharpness.core.meter import Meter
from megatron_sharpness.core.settings import Settings

FOUND = Measurement(iteration=0, consumed_samples=None, lr=0.1, batch="train", status="found")


class Told(list[Alarm]):
    """A sink that alarms go to."""

    def write(self, measurement: Measurement) -> None:
        pass

    def alarm(self, alarm: Alarm) -> None:
        self.append(alarm)


def observe(meter: Meter, ratios: Sequence[float | str]) -> list[bool]:
    """Whether the alarm rings after each of these measurements, of a ratio or a status."""
    rings = []
    for iteration, ratio in enumerate(ratios, 1):
        record = replace(FOUND, iteration=iteration)
        if isinstance(ratio, str):
            record = replace(record, status=ratio)  # type: ignore[arg-type]
        else:
            record = replace(record, lr_over_critical=ratio)
        meter.write(Records([record]))
        rings.append(meter.bell.rings)
    return rings


def meter_of(**settings: object) -> tuple[Meter, Told, list[str]]:
    told, said = Told(), list[str]()
    return Meter(Settings(**settings), [told], said.append), told, said  # type: ignore[arg-type]


def test_it_begins_and_ends_with_measurements_in_a_row() -> None:
    meter, told, said = meter_of(alarm=0.9, alarm_after=2)
    rings = observe(meter, [1.0, 0.8, 1.1, 1.2, 0.5, 1.3, 0.9, 0.2, 0.3, 2.0, 3.0])
    assert [n for n, on in enumerate(rings, 1) if on] == [4, 5, 6, 7, 11]
    assert [(alarm.iteration, alarm.on, alarm.ratios) for alarm in told] == [
        (4, True, (1.1, 1.2)), (8, False, (0.9, 0.2)), (11, True, (2.0, 3.0)),
    ]  # fmt: skip
    assert [line.split(": ")[1][:5] for line in said] == ["ALARM", "the a", "ALARM"]
    assert "above 0.9 (1.1, 1.2)" in said[0] and "iteration 4" in said[0]


def test_what_raises_the_loss_from_the_start_is_above_and_what_tells_nothing_counts_not() -> None:
    meter, told, _ = meter_of(alarm=1.0, alarm_after=3)
    endings = ["not_descent", "skipped_step", "non_finite", "noise_limited", "failed", "no_lower"]
    assert observe(meter, endings) == [False] * 5 + [True]
    assert told[0].ratios == (math.inf,) * 3
    assert observe(meter, ["no_upper", 0.1, "zero_lr", "no_upper"]) == [True] * 3 + [False]


def test_it_looks_closer_while_it_rings() -> None:
    meter, _, _ = meter_of(every=6, alarm=1.0, alarm_every=4)
    assert [n for n in range(1, 13) if meter.due(n)] == [6, 12]
    observe(meter, [2.0, 2.0, 2.0])
    assert [n for n in range(1, 13) if meter.due(n)] == [4, 6, 8, 12]
    observe(meter, [0.5, 0.5, 0.5])
    assert [n for n in range(1, 13) if meter.due(n)] == [6, 12]


def test_two_in_a_row_ring_where_nothing_else_is_said() -> None:
    meter, _, _ = meter_of(alarm=1.0)
    assert observe(meter, [2.0, 0.5, 2.0, 2.0, 0.5, 2.0, 0.5, 0.5]) == [
        False, False, False, True, True, True, True, False
    ]  # fmt: skip


def test_without_one_nothing_rings() -> None:
    meter, told, said = meter_of()
    assert not any(observe(meter, [9.0] * 9)) and not told and not said


def test_it_goes_through_a_checkpoint() -> None:
    begun, _, _ = meter_of(alarm=1.0, alarm_after=3)
    observe(begun, [2.0, 2.0])
    resumed, told, _ = meter_of(alarm=1.0, alarm_after=3)
    resumed.load_state_dict(begun.state_dict())
    assert observe(resumed, [3.0]) == [True]
    assert told[0].ratios == (2.0, 2.0, 3.0)
    again, _, _ = meter_of(alarm=1.0, alarm_after=3)
    again.load_state_dict(resumed.state_dict())
    assert again.bell.rings
    again.load_state_dict({"guesses": [["train", 0.1]]})  # of a version before
    assert not again.bell.rings


def test_the_users_function_is_called_and_costs_no_run() -> None:
    heard: list[Alarm] = []
    meter, _, _ = meter_of(alarm=1.0, alarm_after=1, on_alarm=heard.append)
    observe(meter, [2.0, 0.1])
    assert [alarm.on for alarm in heard] == [True, False]

    def broken(alarm: Alarm) -> None:
        raise OSError("no mail")

    meter, told, said = meter_of(alarm=1.0, alarm_after=1, on_alarm=broken)
    assert observe(meter, [2.0]) == [True]
    assert told and said[1] == "critical sharpness: on_alarm has failed (OSError: no mail)"
    fatal, _, _ = meter_of(alarm=1.0, alarm_after=1, on_alarm=broken, on_error="raise")
    with pytest.raises(OSError, match="no mail"):
        observe(fatal, [2.0])


@pytest.mark.parametrize(
    "settings",
    [
        {"alarm": 0.0}, {"alarm": math.nan}, {"alarm": math.inf}, {"alarm": -1.0},
        {"alarm": 1.0, "alarm_after": 0}, {"alarm": 1.0, "alarm_after": 1.5},
        {"alarm": 1.0, "alarm_every": 0}, {"alarm": 1.0, "alarm_every": 101},
        {"alarm_every": 10}, {"on_alarm": print}, {"alarm": 1.0, "on_alarm": "mail"},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(reversed(settings))):
        Settings(**settings)  # type: ignore[arg-type]
