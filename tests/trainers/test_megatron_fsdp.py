"""The package megatron-fsdp in a loop of one's own: same training, the number of FSDP2."""

from __future__ import annotations

import pytest

from .harness import Ranks, check_found, require, worker_fixture

pair = worker_fixture("megatron_fsdp_worker", "pair", 2, require("megatron-fsdp", "megatron_fsdp"))

DUE = [0, 2, 4]
FP32 = [f"fp32 {strategy}" for strategy in range(4)]
BF16 = [f"bf16 {strategy}" for strategy in range(4)]
OTHERS = ["accumulated", "accumulated, optim", "hybrid", "one precision", "validated", "offload"]


@pytest.mark.parametrize("name", [*FP32, *BF16, *OTHERS])
def test_training_is_bit_for_bit_the_same(name: str, pair: Ranks) -> None:
    for rank in pair:
        assert rank[name]["on"]["training"] == rank[name]["off"]["training"]
        check_found(rank[name]["on"]["records"], DUE)


@pytest.mark.parametrize("name", FP32)
def test_the_number_is_that_of_fsdp2(name: str, pair: Ranks) -> None:
    records, expected = pair[0][name]["number"]["records"], pair[0]["fsdp2"]["records"]
    check_found(records, DUE)
    for record, other in zip(records, expected, strict=True):
        for key in ("loss", "slope", "update_norm", "critical_lr"):
            assert record[key] == pytest.approx(other[key], rel=1e-5), key
        assert record["tokens"] == other["tokens"]


@pytest.mark.parametrize("name", BF16)
def test_in_16_bits_the_number_is_that_without_sharding(name: str, pair: Ranks) -> None:
    records, expected = pair[0][name]["number"]["records"], pair[0][BF16[0]]["number"]["records"]
    check_found(records, DUE)
    for record, other, exact in zip(records, expected, pair[0]["fsdp2"]["records"], strict=True):
        assert record["critical_lr"] == pytest.approx(other["critical_lr"], rel=2e-3)
        assert record["critical_lr"] == pytest.approx(exact["critical_lr"], rel=0.05)
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_no_gather_is_under_way_when_weights_are_written(pair: Ranks) -> None:
    """It would read some of the old and some of the new, and end by writing the old ones."""
    for rank in pair:
        assert len(rank["in flight"]) > 3 and not any(rank["in flight"])


def test_a_frozen_run_trains_nothing(pair: Ranks) -> None:
    for rank in pair:
        begin, end = rank["frozen"]["begin"]["training"], rank["frozen"]["end"]["training"]
        for part in ("parameters", "read by passes"):
            assert end[part] == begin[part]
        records = rank["frozen"]["end"]["records"]
        assert [record["iteration"] for record in records] == [2, 4]
        assert all(record["status"] == "found" for record in records)


def test_a_first_step_off_the_weights_that_its_passes_have_read(pair: Ranks) -> None:
    for rank in pair:
        assert rank["decayed"]["on"]["training"] == rank["decayed"]["off"]["training"]
        first, *later = rank["decayed"]["on"]["records"]
        assert first["status"] == "failed"
        assert "install_optimized_model_weights" in first["reason"]
        assert [record["status"] for record in later] == ["found", "found"]


def test_what_cannot_be_measured_is_refused(pair: Ranks) -> None:
    decoupled, stale = pair[0]["refusals"]
    assert "use_decoupled_grad=False" in decoupled
    assert "overlap_param_gather=True" in stale


def test_the_loop_of_the_page_runs(pair: Ranks) -> None:
    records = pair[0]["page"]
    assert [record["iteration"] for record in records] == [0, 20, 40, 60, 80]
    assert all(record["status"] == "found" for record in records)
