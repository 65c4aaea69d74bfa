"""DDP with buffers that forward passes change: DDP hands rank 0's out before a pass, or not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.processes import start_ranks

from .buffers_worker import KINDS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = start_ranks(["-m", "tests.pytorch.buffers_worker", str(folder)], folder, 2)
    codes = [process.wait(timeout=240) for process in processes]
    assert not any(codes), [p.read_text()[-3000:] for p in folder.glob("output*.txt")]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_to_the_bit_on_every_rank(
    kind: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        assert rank[kind]["on"]["history"] == rank[kind]["off"]["history"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_trained_one(kind: str, ranks: list[dict[str, Any]]) -> None:
    records = [rank[kind]["on"]["records"] for rank in ranks]
    assert [record["iteration"] for record in records[0]] == [3, 6]
    for record, other in zip(*records, strict=True):
        assert record | {"seconds": 0} == other | {"seconds": 0}
        assert record["status"] == "found"
        if "mode" in dict(KINDS[kind].settings):
            assert record["replay_error"] is None
        else:
            assert record["replay_error"] <= 2e-6
    for record, other in zip(*(rank[kind]["on"]["others"] for rank in ranks), strict=True):
        assert record["status"] in ("found", "not_descent")
        assert record | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.parametrize(
    "number",
    ["number", "number, accumulation", "number, inner module given", "number, synced in each"],
)
def test_every_probe_sees_the_buffers_of_the_training_pass(
    number: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        record = rank[number]["record"]
        assert record["status"] == "found"
        assert record["critical_lr"] == pytest.approx(rank[number]["critical_lr"], rel=1e-4)
        assert rank[number]["other"] == pytest.approx(rank[number]["other anew"], rel=1e-6)


def test_ranks_that_may_have_ended_are_not_waited_for(ranks: list[dict[str, Any]]) -> None:
    for rank, steps in zip(ranks, (3, 2), strict=True):
        assert len(rank["join"]["reasons"]) == steps
        for status, reason in rank["join"]["reasons"]:
            assert status == "failed" and reason.startswith("DDP.join(): ")


def test_the_watch_names_ddps_flag_where_it_is_not_put_back(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "model.require_forward_param_sync" in rank["flag"]


def test_a_loss_that_differentiates_leaves_the_reducer_alone(ranks: list[dict[str, Any]]) -> None:
    assert [rank["prepared"] for rank in ranks] == [0, 0]
