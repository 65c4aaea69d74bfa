"""The callback of Hugging Face's ``Trainer``: same training, right numbers, the trainer's logs."""

from __future__ import annotations

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

PATHS = require("hf", "transformers")
alone = worker_fixture("hf_worker", "alone", 0, PATHS)
pair = worker_fixture("hf_worker", "pair", 2, PATHS)

DUE = [2, 4, 6, 8]


@pytest.fixture(params=["single", "ddp", "fsdp2", "tp", "accelerate"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    fixture = "alone" if request.param == "single" else "pair"
    return [rank[request.param] for rank in request.getfixturevalue(fixture)]


def of_training(logs: list[dict[str, float]]) -> list[dict[str, float]]:
    """The logs without what this package adds and without times."""
    return [
        {key: value for key, value in entry.items() if "runtime" not in key and "second" not in key}
        for entry in logs
        if not LOGGED & entry.keys()
    ]


def test_training_is_bit_for_bit_the_same(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["on"]["digest"] == rank["off"]["digest"]
        assert of_training(rank["on"]["logs"]) == of_training(rank["off"]["logs"])
        assert sum("loss" in entry for entry in rank["off"]["logs"]) == 8


def test_records_agree_with_the_definitions(ranks: list[dict[str, Any]]) -> None:
    check_records(ranks[0]["on"], DUE)
    assert not any(rank["on"]["records"] for rank in ranks[1:])


def test_every_rank_logs_the_same(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        logged = [entry for entry in rank["on"]["logs"] if "critical_sharpness" in entry]
        assert [entry["step"] for entry in logged] == DUE
        for entry, record in zip(logged, ranks[0]["on"]["records"], strict=True):
            assert entry.keys() == LOGGED | {"epoch", "step"}
            assert entry["critical_sharpness"] == record["critical_sharpness"]
            assert entry["critical_learning_rate"] == record["critical_lr"]


def test_curves_are_in_tensorboard(alone: list[dict[str, Any]]) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    result = alone[0]["single"]["on"]
    (events,) = Path(result["output"]).rglob("events.out.tfevents*")
    reader = event_accumulator.EventAccumulator(str(events))
    reader.Reload()
    assert {f"train/{key}" for key in LOGGED} <= set(reader.Tags()["scalars"])
    curve = reader.Scalars("train/critical_sharpness")
    assert [point.step for point in curve] == DUE
    assert [point.value for point in curve] == pytest.approx(
        [record["critical_sharpness"] for record in result["records"]]
    )


def test_logs_of_a_trainer_that_gathers_are_the_same(alone: list[dict[str, Any]]) -> None:
    """TRL's trainers add to ``log`` what has gathered since it was called last."""
    runs = alone[0]["single"]
    assert of_training(runs["averages on"]["logs"]) == of_training(runs["averages off"]["logs"])
    assert any(entry.get("micro_batches") == 3.0 for entry in runs["averages off"]["logs"])


def test_nothing_is_left_behind(alone: list[dict[str, Any]]) -> None:
    """Not even where the step after the last one would have been measured."""
    runs = alone[0]["single"]
    assert runs["ended armed"]["hooks"] == runs["saved off"]["hooks"]


@pytest.mark.parametrize("name", ["resumed", "resumed callbacks"])
def test_a_resumed_run_measures_the_same(alone: list[dict[str, Any]], name: str) -> None:
    runs = alone[0]["single"]
    assert untimed(runs[name]["records"]) == untimed(runs["saved"]["records"])[2:]
    assert runs[name]["digest"] == runs["saved"]["digest"] == runs["saved off"]["digest"]


def test_a_resumed_run_measures_the_same_where_accelerate_shards(
    pair: list[dict[str, Any]],
) -> None:
    for rank in pair:
        runs = rank["accelerate"]
        assert untimed(runs["resumed"]["records"]) == untimed(runs["saved"]["records"])[1:]
        assert runs["resumed"]["digest"] == runs["saved"]["digest"] == runs["saved off"]["digest"]
    assert len(pair[0]["accelerate"]["resumed"]["records"]) == 1


def test_a_checkpoint_without_measurements_loads(alone: list[dict[str, Any]]) -> None:
    check_resumed_without_state(alone[0]["single"], [6, 8])


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *(("single", name) for name in (
            "added", "labels taken out", "means", "twice", "teacher", "gathers", "smoothed",
            "function", "without items", "without items, smoothed", "buffers",
        )),
        *(("ddp", name) for name in ("gathers", "smoothed", "without items", "buffers")),
        ("tp", "without items"),
    ],
)  # fmt: skip
def test_the_loss_is_the_one_that_the_trainer_differentiates(
    request: pytest.FixtureRequest, layout: str, name: str
) -> None:
    fixture = request.getfixturevalue("alone" if layout == "single" else "pair")
    ranks = [rank[layout]["losses"][name] for rank in fixture]
    for rank in ranks:
        assert rank["on"]["digest"] == rank["off"]["digest"]
        assert of_training(rank["on"]["logs"]) == of_training(rank["off"]["logs"])
        assert rank["on"]["gathered"] == rank["off"]["gathered"]
        assert rank["on"]["replaced"] == []
    if layout != "tp":
        assert len({rank["on"]["digest"]["parameters"] for rank in ranks}) == 1
    records = ranks[0]["on"]["records"]
    logged = [entry["loss"] for entry in ranks[0]["off"]["logs"] if "loss" in entry]
    assert [record["status"] for record in records] == 3 * ["found"]
    for record, loss in zip(records, logged, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        assert record["replay_error"] <= 2e-6 * record["loss"]


def test_tokens_are_counted_and_samples_where_they_are_not_known(
    alone: list[dict[str, Any]], pair: list[dict[str, Any]]
) -> None:
    def tokens(losses: dict[str, Any], name: str) -> list[int]:
        return [record["tokens"] for record in losses[name]["on"]["records"]]

    single, ddp = alone[0]["single"]["losses"], pair[0]["ddp"]["losses"]
    assert len(set(tokens(single, "added"))) == 3  # examples have different numbers of labels
    assert tokens(single, "added") == tokens(single, "twice") == tokens(single, "function")
    assert tokens(single, "without items") == 3 * [8]
    assert tokens(ddp, "without items") == 3 * [16]
    assert tokens(pair[0]["tp"]["losses"], "without items") == 3 * [8]  # on both ranks


def test_a_loss_that_is_differentiated_in_parts_is_told(alone: list[dict[str, Any]]) -> None:
    for record in alone[0]["single"]["own step"]["records"]:
        assert record["status"] == "failed" and record["critical_lr"] is None
        assert "2 calls of accelerator.backward and 1 of compute_loss" in record["reason"]


def test_the_noise_is_that_of_the_precision_inside_of_the_model(
    alone: list[dict[str, Any]],
) -> None:
    """accelerate enters autocast in the model's own forward, where no hook around it sees it."""
    runs = alone[0]["single"]
    for rounded, exact in zip(runs["bf16"]["records"], runs["on"]["records"][1::2], strict=True):
        assert rounded["status"] == "found"
        assert rounded["noise"] > 1e-6 > exact["noise"]
        assert rounded["replay_error"] <= 2e-6 * rounded["loss"]
