"""Which second moments a report says could be means, and what that would save."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_sharpness.report.records import Run
from megatron_sharpness.report.second_moments import Kind, format_moments, kinds_of
from tests.processes import ROOT


def record(iteration: int, **kinds: tuple[float | None, ...]) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "adam_snr": {
            name: {"shapes": [[2, 4, 8]]}
            | dict(zip(("fan_in", "fan_out", "both"), ratios, strict=True))
            for name, ratios in kinds.items()
        },
    }


@pytest.mark.parametrize(
    ("ratios", "over", "left"),
    [
        ((3.0, 1.5, 0.9), "fan_in", 8),
        ((0.2, 1.0, 0.1), "fan_out", 16),
        ((0.99, 0.9, 0.8), None, 64),
        ((math.nan, math.nan, math.nan), None, 64),
        ((math.nan, 2.0, 3.0), "both", 2),
    ],
)
def test_the_dimension_with_the_largest_ratio_if_that_is_large(
    ratios: tuple[float, ...], over: str | None, left: int
) -> None:
    kind = Kind("w", ((2, 4, 8),), dict(zip(("fan_in", "fan_out", "both"), ratios, strict=True)))
    assert (kind.over, kind.left, kind.moments) == (over, left, 64)


def test_ratios_are_means_over_measurements() -> None:
    run = Run("run", [
        record(10, a=(0.5, 2.0, None)), {"iteration": 20, "adam_snr": None}, {"iteration": 30},
        record(40, a=(1.0, 4.0, None), b=(0.1, 0.2, 0.3)),
    ])  # fmt: skip
    first, second = kinds_of(run)
    assert (first.ratios["fan_in"], first.ratios["fan_out"], first.over) == (0.75, 3.0, "fan_out")
    assert math.isnan(first.ratios["both"]) and second.over is None
    *_, said = format_moments(run).splitlines()
    assert "means of up to 2 measurements" in said
    assert "80 numbers in place of 128, 37.5% less" in said


def test_a_kind_of_two_shapes_is_one_line() -> None:
    late = {"shapes": [[1, 4, 8], [1, 16, 8]], "fan_in": 2.0, "fan_out": 0.1, "both": 0.1}
    run = Run("run", [record(10, a=(2.0, 0.1, 0.1)), {"iteration": 20, "adam_snr": {"a": late}}])
    _, line, said = format_moments(run).splitlines()
    assert line.split() == ["a", "1,", "1", "4,", "16", "8,", "8", "2", "0.1", "0.1", "fan_in",
                            "12.50%"]  # fmt: skip
    assert "20 numbers in place of 160" in said


def test_nothing_is_said_where_nothing_was_measured() -> None:
    assert format_moments(Run("run", [{"iteration": 10, "adam_snr": None}])) == ""


def test_the_page_shows_the_records_of_the_experiment() -> None:
    from experiments import training
    from experiments.slim_adam.run import RULE_FROM

    rows = training.read(ROOT / "experiments" / "slim_adam")[RULE_FROM]
    page = (ROOT / "docs" / "reading.md").read_text()
    for line in format_moments(Run("", rows)).splitlines():
        assert line in page
