"""Pipeline parallelism: bit for bit the training without measurement, and the right number."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.processes import start_ranks

from .pipelines_worker import PIPELINES, WITH_DATA_PARALLEL

Ranks = list[dict[str, Any]]


def started(factory: pytest.TempPathFactory, processes: int) -> Ranks:
    folder = factory.mktemp("ranks")
    arguments = ["-m", "tests.pytorch.pipelines_worker", str(folder)]
    ranks = start_ranks(arguments, folder, processes)
    try:
        codes = [rank.wait(timeout=560) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(codes), [p.read_text()[-3000:] for p in folder.glob("output*.txt")]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return started(tmp_path_factory, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return started(tmp_path_factory, 4)


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**record, "seconds": None} for record in records]


def check(name: str, ranks: Ranks) -> None:
    evaluated = name.endswith("eval")
    found = [rank[name] for rank in ranks]
    for rank in found:
        assert rank["on"] == rank["off"]
        assert untimed(rank["records"]) == untimed(found[0]["records"])
    trained = [r for r in found[0]["records"] if r["batch"] == "train" and r["part"] is None]
    assert [record["iteration"] for record in trained] == [0, 2]
    for record in trained:
        assert record["status"] == "found"
        if evaluated:
            assert record["replay_error"] is None
        else:
            assert record["replay_error"] <= 2e-6
    check_masked(found[0]["masked"], evaluated)
    check_exact(found[0]["exact"])


def check_masked(masked: dict[str, Any], evaluated: bool) -> None:
    """The record of a step with dropout, against one process with the same masks."""
    record = masked["record"]
    assert record["loss"] == pytest.approx(masked["loss"], rel=1e-6)
    if not evaluated:  # the gradient is that of the training pass
        assert record["slope"] == pytest.approx(masked["slope"], rel=1e-4)
    assert masked["lower"] <= masked["loss"] < masked["upper"]
    assert record["critical_lr_lower"] > 3 / 4 * record["critical_lr_upper"] * (1 - 1e-9)


def check_exact(exact: dict[str, Any]) -> None:
    """The record of a step without dropout, against one process in fp64."""
    by_part = {r["part"]: r for r in exact["records"] if r["batch"] == "train"}
    record = by_part.pop(None)
    assert record["loss"] == pytest.approx(exact["loss"], rel=1e-6)
    assert record["slope"] == pytest.approx(exact["slope"], rel=1e-5)
    assert record["critical_lr_error"] < 1e-3
    assert record["critical_lr"] == pytest.approx(exact["critical_lr"], rel=1e-4)
    assert record["critical_lr_lower"] <= exact["critical_lr"] < record["critical_lr_upper"]
    (other,) = (r for r in exact["records"] if r["batch"] == "other")
    assert other["status"] == "found"
    assert other["critical_lr"] == pytest.approx(exact["other"], rel=1e-3)
    assert tuple(by_part) == tuple(exact["parts"])
    for part, slope in exact["parts"].items():
        assert by_part[part]["slope"] == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name: str, pair: Ranks) -> None:
    check(name, pair)


@pytest.mark.parametrize("name", WITH_DATA_PARALLEL)
def test_pipelines_with_data_parallelism(name: str, four: Ranks) -> None:
    check(name, four)


def test_a_resumed_pipeline_measures_the_same(pair: Ranks) -> None:
    for rank in pair:
        assert untimed(rank["resumed"]["again"]) == untimed(rank["resumed"]["without"]) != []
        without, again = rank["resumed"]["history"]
        assert again == without


def test_a_measurement_leaves_the_schedule_as_it_was(pair: Ranks) -> None:
    for rank in pair:
        found = rank["schedule"]
        for name in ("schedule", "stage", "cached"):
            before, after = found[name]
            assert after == before
        # Those of the step, and of each evaluation: none to learn of shapes once more.
        assert found["calls"] % 4 == 0
        assert found["closed"]


def test_what_cannot_be_measured_is_told(pair: Ranks) -> None:
    for rank in pair:
        assert "PipelineStage is no torch.nn.Module" in rank["refusals"]["a stage"]
        assert "give the model as the loop calls it" in rank["refusals"]["a stage"]
        assert "grad_norm is not the same on all ranks" in rank["refusals"]["norms of ranks"]
        assert "return (0.0, 0) there" in rank["refusals"]["tokens without a loss"]
        assert "give the schedule as the model" in rank["refusals"]["a stage's module"]
