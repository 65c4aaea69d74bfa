"""A run that is measured at every iteration, through faults, ends as the plain one and leaves no
memory behind: a short one made here, and the committed one."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest

from benchmarks import endurance
from benchmarks.results import load

RUNS = ("plain", "measured")


def check(document: dict[str, Any]) -> None:
    """What both keep."""
    settings, results = document["settings"], document["results"]
    for run in results["runs"].values():
        assert run["losses_that_differ"] == run["losses_missing"] == 0
        assert run["end_differs_in"] == []
    faults = results["faults"]
    # A full disk costs the lines that it takes, and nothing else is lost.
    assert faults["not_in_the_file"] == list(range(settings["full"], settings["freed"]))
    assert faults["said"] == faults["cut_lines"] == 1
    assert faults["not_printed"] == []
    # It went on after the signal, and from the checkpoint before the death, and measured the same.
    first, second, third = faults["started_at"]
    assert (first, second) == (1, settings["sigterm"] + 1)
    assert second < third < settings["kill"]
    assert faults["measured_twice"] == settings["kill"] - third
    assert faults["differ_the_second_time"] == 0
    lines = settings["exception"] - 1 - len(faults["not_in_the_file"])
    assert faults["before_the_exception"] == lines
    assert faults["differ_before_the_exception"] == 0
    # One measurement fails, and those after it begin elsewhere.
    assert faults["failed"] == {str(settings["exception"]): "rank 1: RuntimeError: injected"}
    assert faults["within_twice_the_stated"] >= 0.9 * faults["after_the_exception"] > 0
    assert faults["nan"]["status"] == "found" and faults["nan"]["off"] < 0.5


@pytest.mark.timeout(900)  # 80 s on two cores of its own
def test_a_short_run_through_all_faults() -> None:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    document = endurance.run(60)
    check(document)
    assert endurance.table(document).count("| nothing |") == 3
    # The memory of so young a process is not at rest, but for what Python keeps: an object a
    # measurement would be 1 or more.
    for process in document["results"]["runs"]["measured"]["memory"]:
        slope, error = process["blocks"]
        assert slope < 5 + 3 * error


def test_the_committed_run_lost_nothing() -> None:
    document = load("endurance")
    assert document["settings"]["iterations"] == 3000
    check(document)


def test_three_thousand_measurements_leave_no_memory_behind() -> None:
    """None that the plain run, which has Megatron's own, does not leave, too."""
    plain, measured = (load("endurance")["results"]["runs"][run]["memory"] for run in RUNS)
    for before, after in zip(plain, measured, strict=True):
        assert before["rank"] == after["rank"] and after["last"] == 3000
        for kind, least in {"resident": 1000, "allocated": 100, "blocks": 1}.items():
            (slope, error), (own, own_error) = after[kind], before[kind]
            assert slope - own < 3 * math.hypot(error, own_error)
            assert math.hypot(error, own_error) < least  # it would have been seen


@pytest.mark.parametrize("kept", [0.0, 0.8])
def test_the_error_of_a_slope_is_that_of_samples_that_depend_on_one_another(kept: float) -> None:
    random, x = np.random.default_rng(0), np.arange(100)
    off = []
    for _ in range(300):
        noise = random.normal(size=len(x))
        for now in range(1, len(x)):
            noise[now] += kept * noise[now - 1]
        slope, error = endurance.drift(list(x), list(0.5 * x + noise))
        off.append((slope - 0.5) / error)
    assert abs(np.mean(off)) < 0.25
    assert np.mean(np.abs(off) < 2) > 0.8


def test_what_stays_has_no_slope() -> None:
    assert endurance.drift(range(50), [7] * 50) == [0.0, 0.0]
