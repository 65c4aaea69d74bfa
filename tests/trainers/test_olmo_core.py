"""The callback of OLMo-core: same training, right numbers, the trainer's metrics."""

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

PATHS = require("olmo-core", "olmo_core")
alone = worker_fixture("olmo_core_worker", "alone", 0, PATHS)
pair = worker_fixture("olmo_core_worker", "pair", 2, PATHS)

DUE = [2, 4, 6, 8]
LOGGED = {
    "optim/critical sharpness",
    "optim/critical learning rate",
    "optim/learning rate over critical",
    "optim/directional sharpness",
    "optim/edge of stability",
    "optim/critical sharpness evaluations",
    "optim/critical sharpness seconds",
}


@pytest.fixture(params=["single", "ddp", "fsdp", "tp"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    fixture = "alone" if request.param == "single" else "pair"
    return [rank[request.param] for rank in request.getfixturevalue(fixture)]


def of_training(metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The metrics without what this package adds and without times."""
    return {
        step: {
            name: value
            for name, value in entry.items()
            if name not in LOGGED and not name.startswith(("throughput/", "checkpoint/"))
        }
        for step, entry in metrics.items()
    }


def test_training_is_bit_for_bit_the_same(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["on"]["digest"] == rank["off"]["digest"]
        assert of_training(rank["on"]["metrics"]) == of_training(rank["off"]["metrics"])
        assert sum("train/CE loss" in entry for entry in rank["off"]["metrics"].values()) == 8
        assert rank["off"]["verdict"] == []
    said = [line for rank in ranks for line in rank["on"]["verdict"]]
    assert said == [" critical sharpness: verdict: too few measurements to tell"]  # of one rank


def test_the_loss_is_the_trainer_s(ranks: list[dict[str, Any]]) -> None:
    for record in ranks[0]["on"]["records"]:
        logged = ranks[0]["on"]["metrics"][str(record["iteration"])]
        assert record["loss"] == pytest.approx(logged["train/CE loss"], rel=2e-7)


@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp"])
def test_records_agree_with_the_definitions(request: pytest.FixtureRequest, layout: str) -> None:
    result = request.getfixturevalue("alone" if layout == "single" else "pair")[0][layout]["on"]
    check_records(result, DUE)


def test_metrics_hold_the_records(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        records = {str(record["iteration"]): record for record in rank["on"]["records"]}
        for step, entry in rank["on"]["metrics"].items():
            assert LOGGED & entry.keys() == (LOGGED if step in records else set())
        for step, record in records.items():
            entry = rank["on"]["metrics"][step]
            assert entry["optim/critical sharpness"] == pytest.approx(record["critical_sharpness"])
            assert entry["optim/critical learning rate"] == pytest.approx(record["critical_lr"])


def test_a_resumed_run_measures_the_same(alone: list[dict[str, Any]]) -> None:
    runs = alone[0]["single"]
    assert untimed(runs["resumed"]["records"]) == untimed(runs["saved"]["records"])[2:]
    for part in ("parameters", "optimizer"):
        assert runs["resumed"]["digest"][part] == runs["saved"]["digest"][part]
    assert runs["saved"]["digest"] == runs["saved off"]["digest"]


def test_a_checkpoint_without_measurements_loads(alone: list[dict[str, Any]]) -> None:
    check_resumed_without_state(alone[0]["single"], [6, 8])


def test_steps_that_the_trainer_skips(alone: list[dict[str, Any]]) -> None:
    runs = alone[0]["single"]
    assert runs["skipping"]["digest"] == runs["skipping off"]["digest"]
    assert [(r["iteration"], r["status"]) for r in runs["skipping"]["records"]] == [
        (2, "found"),
        (4, "skipped_step"),
        (6, "found"),
        (8, "found"),
    ]


def test_what_cannot_be_replayed_is_refused(alone: list[dict[str, Any]]) -> None:
    basic, normalized = alone[0]["single"]["refusals"]
    assert "BasicTrainModule" in basic and "train with TransformerTrainModule" in basic
    assert "NormalizedTransformer" in normalized and "after the optimizer's step" in normalized


def test_configuration_files_and_overrides(alone: list[dict[str, Any]]) -> None:
    assert alone[0]["single"]["config"] == {
        "type": "CriticalSharpnessCallback",
        "every": 20,
        "tolerance": 0.01,
    }
