"""The committed results keep what is promised of the search."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import precision
from benchmarks.results import load

Row = dict[str, Any]

PASSES: list[Row] = load("passes")["results"]
PRECISION: list[Row] = load("precision")["results"]


def of(method: str, **cells: str) -> list[Row]:
    rows = [
        row
        for row in PASSES
        if row["method"] == method and all(row[key] == value for key, value in cells.items())
    ]
    assert rows
    return rows


@pytest.mark.parametrize(
    ("method", "cadence", "mean"),
    [
        ("certified", "every step", 2.6),
        ("certified", "every 10", 2.8),
        ("certified", "every 100", 2.9),
        ("certified", "cold", 3.4),
        ("certified, no slope", "every step", 2.8),
        ("bisection", "every step", 6.1),
    ],
)
def test_passes_of_a_search(method: str, cadence: str, mean: float) -> None:
    (row,) = of(method, cadence=cadence, group="held out", phase="step >= 20")
    assert row["mean"] <= mean
    assert row["statuses"] == {"found": row["searches"]}


def test_no_search_takes_more_than_ten_passes() -> None:
    assert max(row["max"] for row in of("certified") + of("certified, no slope")) <= 10


@pytest.mark.parametrize("group", ["held out", "large batch"])
@pytest.mark.parametrize("method", ["certified", "certified, no slope"])
def test_the_error_is_small_and_what_is_stated_of_it_true(group: str, method: str) -> None:
    for row in of(method, group=group, phase="step >= 20"):
        assert row["median_error_of_eta"] <= 0.004
        assert row["p95_error_of_eta"] <= 0.03
        assert row["within_twice_stated"] >= 0.9
        assert row["median_stated"] < max(0.01, 10 * row["median_error_of_eta"])


def test_what_is_found_in_16_bits_is_what_fp32_finds() -> None:
    """Off by no more than the stated uncertainties and 10 %."""
    found = [
        (row, exact)
        for row, exact in precision.compared(PRECISION)
        if row["status"] == "found" and exact["status"] == "found"
    ]
    assert len(found) > 250
    assert [row for row, exact in found if precision.off(row, exact) > 1] == []


def test_what_is_found_in_16_bits_is_found_in_fp32() -> None:
    pairs = [(row["status"], exact["status"]) for row, exact in precision.compared(PRECISION)]
    assert ("found", "found") in pairs and ("noise_limited", "found") in pairs
    assert not [pair for pair in pairs if pair[0] == "found" != pair[1]]
