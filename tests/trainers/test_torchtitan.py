"""torchtitan's trainer, measuring: same training, right numbers, torchtitan's curves."""

from __future__ import annotations

from typing import Any

import pytest

from .harness import (
    check_records,
    check_resumed_without_state,
    require,
    untimed,
    worker_fixture,
)

PATHS = require("torchtitan", "torchtitan")
alone = worker_fixture("torchtitan_worker", "alone", 1, PATHS)
pair = worker_fixture("torchtitan_worker", "pair", 2, PATHS)

DUE = [2, 4, 6]
LOGGED = {
    "sharpness_metrics/critical_sharpness",
    "sharpness_metrics/critical_learning_rate",
    "sharpness_metrics/learning_rate_over_critical",
    "sharpness_metrics/directional_sharpness",
    "sharpness_metrics/edge_of_stability",
    "sharpness_metrics/critical_sharpness_evaluations",
    "sharpness_metrics/critical_sharpness_seconds",
}
TIMES = ("throughput", "tflops", "time_metrics/", "mfu")


WITNESSED = ["single", "fsdp", "pp", "experts"]


@pytest.fixture(params=[*WITNESSED, "tp", "interleaved, compiled"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    fixture = "alone" if request.param == "single" else "pair"
    return [rank[request.param] for rank in request.getfixturevalue(fixture)]


def of_training(curves: dict[str, Any]) -> dict[str, Any]:
    """The curves without what this package adds and without times."""
    return {
        tag: points
        for tag, points in curves.items()
        if tag not in LOGGED and not tag.startswith(TIMES)
    }


def test_training_is_bit_for_bit_the_same(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["off"]["class"] == "Trainer"
        assert rank["on"]["class"] == "CriticalSharpnessTrainer"
        assert rank["on"]["digest"] == rank["off"]["digest"]
        assert of_training(rank["on"]["curves"]) == of_training(rank["off"]["curves"])
        assert "loss_metrics/global_avg_loss" in rank["off"]["curves"]
        assert rank["off"]["verdict"] == []
    said = [line for rank in ranks for line in rank["on"]["verdict"]]
    assert said == [" critical sharpness: verdict: too few measurements to tell"]  # of one rank


@pytest.mark.parametrize("layout", WITNESSED)
def test_records_agree_with_the_definitions(request: pytest.FixtureRequest, layout: str) -> None:
    result = request.getfixturevalue("alone" if layout == "single" else "pair")[0][layout]["on"]
    # The slope is as exact as the norm of the gradients, which torch sums in fp32 on the CPU.
    check_records(result, DUE, slope=1e-3)


def test_curves_hold_the_records(ranks: list[dict[str, Any]]) -> None:
    """At every step that is due, whether the trainer logs at it or not."""
    records, curves = ranks[0]["on"]["records"], ranks[0]["on"]["curves"]
    assert curves.keys() >= LOGGED
    for tag, field in (
        ("critical_sharpness", "critical_sharpness"),
        ("critical_learning_rate", "critical_lr"),
    ):
        points = curves[f"sharpness_metrics/{tag}"]
        assert [step for step, _ in points] == DUE
        assert [value for _, value in points] == pytest.approx([r[field] for r in records])
    losses = dict(curves["loss_metrics/global_avg_loss"])
    assert records[-1]["loss"] == pytest.approx(losses[DUE[-1]], rel=2e-7)


def test_the_loss_in_chunks(alone: list[dict[str, Any]]) -> None:
    runs = alone[0]["single"]
    assert runs["chunked"]["digest"] == runs["at every=0"]["digest"]
    assert not runs["at every=0"]["records"]
    for chunked, record in zip(runs["chunked"]["records"], runs["on"]["records"], strict=True):
        assert chunked["status"] == "found"
        assert chunked["critical_lr"] == pytest.approx(record["critical_lr"], rel=1e-3)


def test_a_resumed_run_measures_the_same(alone: list[dict[str, Any]]) -> None:
    runs = alone[0]["single"]
    assert untimed(runs["resumed"]["records"]) == untimed(runs["saved"]["records"])[1:]
    for part in ("parameters", "optimizer"):
        assert runs["resumed"]["digest"][part] == runs["saved"]["digest"][part]
    assert runs["saved"]["digest"] == runs["saved off"]["digest"]


def test_a_checkpoint_without_measurements_loads(alone: list[dict[str, Any]]) -> None:
    check_resumed_without_state(alone[0]["single"], [4, 6])


def test_what_cannot_be_measured_with_is_refused(alone: list[dict[str, Any]]) -> None:
    graphs, context = alone[0]["single"]["refusals"]
    assert "--training.disable_cuda_graphs" in graphs
    assert "--parallelism.context_parallel_degree" in context and "set it to 1" in context
