"""The callback of Lightning's ``Trainer``: same training, right numbers, Lightning's loggers."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from .harness import (
    LOGGED,
    check_records,
    check_resumed_without_state,
    require,
    untimed,
    worker_fixture,
)

PATHS = require("lightning", "lightning")
alone = worker_fixture("lightning_worker", "alone", 0, PATHS)
pair = worker_fixture("lightning_worker", "pair", 2, PATHS)

DUE = [2, 4, 6, 8]


@pytest.fixture(params=["single", "autocast", "ddp", "fsdp2"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    fixture = "pair" if request.param in ("ddp", "fsdp2") else "alone"
    return [rank[request.param] for rank in request.getfixturevalue(fixture)]


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """What the CSV logger has written, without empty cells."""
    with Path(result["output"], "metrics.csv").open() as file:
        return [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def test_training_is_bit_for_bit_the_same(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["on"]["digest"] == rank["off"]["digest"]
    added = [row for row in rows(ranks[0]["on"]) if LOGGED & row.keys()]
    assert [row for row in rows(ranks[0]["on"]) if row not in added] == rows(ranks[0]["off"])
    assert any("train_loss" in row for row in rows(ranks[0]["off"]))


def test_records_agree_with_the_definitions(ranks: list[dict[str, Any]]) -> None:
    check_records(ranks[0]["on"], DUE)
    assert not any(rank["on"]["records"] for rank in ranks[1:])


def test_the_replay_is_in_the_trainer_s_precision(alone: list[dict[str, Any]]) -> None:
    """The two would agree with their definitions too if neither were in bf16."""
    losses = [
        [record["loss"] for record in alone[0][name]["on"]["records"]]
        for name in ("single", "autocast")
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_all_loggers_have_the_curves(alone: list[dict[str, Any]]) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    result = alone[0]["single"]["on"]
    measured = [record["critical_sharpness"] for record in result["records"]]
    # Lightning counts from 0, and writes its own metrics after every third step only.
    steps = [step - 1 for step in DUE]
    logged = [row for row in rows(result) if "critical_sharpness" in row]
    assert [int(row["step"]) for row in logged] == steps
    assert [float(row["critical_sharpness"]) for row in logged] == measured
    assert logged[0].keys() == LOGGED | {"step"}
    (events,) = Path(result["output"]).rglob("events.out.tfevents*")
    reader = event_accumulator.EventAccumulator(str(events))
    reader.Reload()
    assert set(reader.Tags()["scalars"]) >= LOGGED
    curve = reader.Scalars("critical_sharpness")
    assert [point.step for point in curve] == steps
    assert [point.value for point in curve] == pytest.approx(measured)


def test_nothing_is_left_behind(alone: list[dict[str, Any]]) -> None:
    """Not even where the step after the last one would have been measured."""
    runs = alone[0]["single"]
    assert runs["ended armed"]["hooks"] == runs["saved off"]["hooks"]


def test_a_resumed_run_measures_the_same(alone: list[dict[str, Any]]) -> None:
    runs = alone[0]["single"]
    assert untimed(runs["resumed"]["records"]) == untimed(runs["saved"]["records"])[2:]
    parameters = {runs[name]["digest"]["parameters"] for name in ("saved off", "saved", "resumed")}
    assert len(parameters) == 1


def test_a_checkpoint_without_measurements_loads(alone: list[dict[str, Any]]) -> None:
    check_resumed_without_state(alone[0]["single"], [6, 8])


def test_batches_of_different_lengths_are_weighed_as_in_training(
    alone: list[dict[str, Any]],
) -> None:
    runs = alone[0]["single"]
    assert runs["ragged"]["digest"] == runs["ragged off"]["digest"]
    assert len({record["tokens"] for record in runs["ragged"]["records"]}) > 1
    for record in runs["ragged"]["records"]:
        assert record["status"] == "found"
        assert record["replay_error"] <= 2e-6 * record["loss"]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("single", "skipping"), ("single", "counting"), ("accumulated", "counting"),
        ("accumulated", "running"), ("each batch", "running"),
    ],
)  # fmt: skip
def test_what_a_training_step_changes_or_leaves_out_is_as_in_training(
    request: pytest.FixtureRequest, layout: str, name: str
) -> None:
    fixture = request.getfixturevalue("alone" if layout == "single" else "pair")
    ranks = [rank[layout] for rank in fixture]
    for rank in ranks:
        assert rank[name]["digest"] == rank[f"{name} off"]["digest"]
    assert len({rank[name]["digest"]["parameters"] for rank in ranks}) == 1
    records = ranks[0][name]["records"]
    assert len(records) >= 4
    for record in records:
        assert record["status"] == "found"
        assert record["replay_error"] <= 2e-6 * record["loss"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("mean", "a mean where the sum"),
        ("another loss", "another loss"),
        ("other batches", "another batch at each call"),
    ],
)
def test_a_wrong_loss_is_told(alone: list[dict[str, Any]], wrong: str, said: str) -> None:
    runs = alone[0]["single"]
    assert runs[wrong]["digest"] == runs["off"]["digest"]
    assert len(runs[wrong]["records"]) == 2
    for record in runs[wrong]["records"]:
        assert record["status"] == "failed" and record["critical_lr"] is None
        assert said in record["reason"]


def test_what_cannot_be_measured_is_refused(alone: list[dict[str, Any]]) -> None:
    manual, value = alone[0]["single"]["refusals"]
    assert "automatic_optimization=False" in manual
    assert "gradient_clip_algorithm='value'" in value
