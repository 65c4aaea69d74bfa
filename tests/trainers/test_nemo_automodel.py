"""NeMo AutoModel's recipe, measuring: same training, right numbers, among its own metrics."""

from __future__ import annotations

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

PATHS = [
    *require("automodel", "nemo_automodel"),
    *require("hf", "transformers"),
    *require("torchtitan", "datasets"),
]
alone = worker_fixture("nemo_automodel_worker", "alone", 1, PATHS)
pair = worker_fixture("nemo_automodel_worker", "pair", 2, PATHS)

DUE = [0, 2, 4]  # AutoModel counts from 0
TIMES = {"timestamp", "tps", "tps_per_gpu", "mfu"}


@pytest.fixture(params=["single", "fsdp2", "ddp", "tp"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    fixture = "alone" if request.param == "single" else "pair"
    return [rank[request.param] for rank in request.getfixturevalue(fixture)]


def of_training(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics without what this package adds and without times."""
    return [{k: v for k, v in line.items() if k not in LOGGED | TIMES} for line in logged]


def check_same(off: dict[str, Any], on: dict[str, Any]) -> None:
    assert off["class"] == "TrainFinetuneRecipeForNextTokenPrediction"
    assert on["class"] == "CriticalSharpnessRecipe"
    assert on["digest"] == off["digest"]
    assert of_training(on["logged"]) == of_training(off["logged"])
    assert len(off["logged"]) == 6 and off["verdict"] == []


def test_training_is_bit_for_bit_the_same(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        check_same(rank["off"], rank["on"])
    said = [line for rank in ranks for line in rank["on"]["verdict"]]
    assert said == [" critical sharpness: verdict: too few measurements to tell"]  # of one rank


def test_records_agree_with_the_definitions(ranks: list[dict[str, Any]]) -> None:
    check_records(ranks[0]["on"], DUE)
    for rank in ranks:
        assert rank["on"]["anew"] == ranks[0]["on"]["anew"]


def test_metrics_hold_the_records(ranks: list[dict[str, Any]]) -> None:
    records, logged = ranks[0]["on"]["records"], ranks[0]["on"]["logged"]
    measured = [line for line in logged if line.keys() & LOGGED]
    assert [line["step"] for line in measured] == DUE
    for line, record in zip(measured, records, strict=True):
        assert line.keys() >= LOGGED
        assert line["critical_sharpness"] == record["critical_sharpness"]
        assert line["critical_learning_rate"] == record["critical_lr"]
        assert line["loss"] == pytest.approx(record["loss"], rel=1e-6)
    # AutoModel logs the rate of the next step, the record has the one that moved the weights.
    assert records[2]["lr"] == logged[3]["lr"]


def test_the_recipe_that_does_not_measure_is_the_one_it_comes_from(
    alone: list[dict[str, Any]],
) -> None:
    runs = alone[0]["single"]
    check_same(runs["off"], runs["at every=0"])
    assert not runs["at every=0"]["records"]


def test_low_rank_adapters(alone: list[dict[str, Any]]) -> None:
    runs = alone[0]["single"]["lora"]
    assert runs["on"]["trained"] and all("lora" in name for name in runs["on"]["trained"])
    check_same(runs["off"], runs["on"])
    for record in runs["on"]["records"]:
        assert record["status"] == "found"
        assert record["replay_error"] <= 2e-6 * record["loss"]


def test_the_mixed_precision_that_is_the_default(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        runs = rank["bf16"]
        check_same(runs["off"], runs["on"])
        for record in runs["on"]["records"]:
            assert record["status"] == "found", record["reason"]
            assert record["noise"] > 1e-5  # of weights read in bf16
            assert record["replay_error"] <= 2e-6 * record["loss"]


@pytest.mark.parametrize("layout", ["single", "fsdp2"])
def test_a_resumed_run_measures_the_same(request: pytest.FixtureRequest, layout: str) -> None:
    for rank in request.getfixturevalue("alone" if layout == "single" else "pair"):
        runs = rank[layout]
        assert untimed(runs["resumed"]["records"]) == untimed(runs["saved"]["records"])[2:]
        for part in ("parameters", "optimizer", "recipe"):
            assert runs["resumed"]["digest"][part] == runs["saved"]["digest"][part]
        assert runs["saved"]["digest"] == runs["saved off"]["digest"]


def test_a_checkpoint_without_measurements_loads(alone: list[dict[str, Any]]) -> None:
    check_resumed_without_state(alone[0]["single"], [4])


def test_what_cannot_be_measured_with_is_refused(alone: list[dict[str, Any]]) -> None:
    pipeline, context, strategy, mixture = alone[0]["single"]["refusals"]
    assert "distributed.pp_size" in pipeline and "set it to 1" in pipeline
    assert "distributed.cp_size" in context and "distributed.ep_size" in context
    assert "distributed.strategy" in strategy and "use fsdp2 or ddp" in strategy
    assert "domain_mixture" in mixture


def test_the_configuration_of_the_page_is_measured(alone: list[dict[str, Any]]) -> None:
    records = alone[0]["single"]["page"]
    assert [record["iteration"] for record in records] == [0, 2, 4, 6, 8]
    assert {record["status"] for record in records} == {"found"}
