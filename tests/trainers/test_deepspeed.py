"""DeepSpeed's engine: same training under every ZeRO, the number of the same step under DDP."""

from __future__ import annotations

from typing import Any

import pytest

from .harness import Ranks, check_found, require, untimed, worker_fixture

PATHS = require("deepspeed", "deepspeed")

pair = worker_fixture("deepspeed_worker", "pair", 2, PATHS)
trainer = worker_fixture(
    "hf_deepspeed_worker", "trainer", 2, [*PATHS, *require("hf", "transformers")]
)

DUE = [0, 2, 4]
FP32 = [f"fp32 {stage}" for stage in range(4)]
IN_16_BITS = [
    *(f"bf16 {stage}" for stage in range(4)), "bf16 1, gradients in fp32",
    "fp16 0", "fp16 2", "fp16 3",
]  # fmt: skip
OTHERS = [
    "accumulated 1", "accumulated 2", "accumulated 3", "recomputed 3", "sub-groups", "offload 2",
    "offload 3", "copies on the host", "autocast",
]  # fmt: skip


def of(rank: dict[str, Any], name: str) -> Any:
    """What a rank has of it; skipped where DeepSpeed does not run in fp16."""
    if name not in rank and name.split()[0] in ("fp16", "growing", "overflow"):
        pytest.skip("DeepSpeed does not run in fp16 on this CPU (oneDNN computes in it on few)")
    return rank[name]


@pytest.mark.parametrize("name", [*FP32, *IN_16_BITS, *OTHERS])
def test_training_is_bit_for_bit_the_same(name: str, pair: Ranks) -> None:
    for rank in pair:
        trained = of(rank, name)
        assert trained["on"]["training"] == trained["off"]["training"]
        check_found(trained["on"]["records"], DUE)


@pytest.mark.parametrize("name", FP32)
def test_the_number_is_that_of_the_step_under_ddp(name: str, pair: Ranks) -> None:
    records, expected = pair[0]["number"][name], pair[0]["ddp"]
    check_found(records, DUE)
    # Of a step in fp32 without ZeRO DeepSpeed keeps no norm of what it clips: the slope is left
    # out, and the search, which begins from it elsewhere, ends in another bracket.
    slope = name != "fp32 0"
    for record, other in zip(records, expected, strict=True):
        for key in ("loss", "update_norm", *(["slope", "critical_lr"] if slope else [])):
            assert record[key] == pytest.approx(other[key], rel=1e-4), key
        assert record["critical_lr_lower"] < other["critical_lr_upper"]
        assert record["critical_lr_upper"] > other["critical_lr_lower"]


@pytest.mark.parametrize("name", IN_16_BITS)
def test_in_16_bits_the_number_is_near_that_in_fp32(name: str, pair: Ranks) -> None:
    """But for dropout's masks the same training: of its first step, before roundings add up."""
    record = of(pair[0], name)["on"]["records"][0]
    # Without ZeRO DeepSpeed begins with a step on gradients of 0, so that Adam's first is shorter.
    expected = pair[0]["bf16 0" if name.endswith(" 0") else "fp32 2"]["on"]["records"][0]
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert record["critical_lr"] == pytest.approx(expected["critical_lr"], rel=0.05)


def test_a_step_that_overflows_is_skipped(pair: Ranks) -> None:
    for rank in pair:
        trained = of(rank, "overflow")
        assert trained["on"]["training"] == trained["off"]["training"]
        statuses = [record["status"] for record in trained["on"]["records"]]
        assert statuses == ["skipped_step", "skipped_step", "found"]


def test_where_the_loss_scale_grows_no_slope_is_that_of_another_scale(pair: Ranks) -> None:
    """In that step ZeRO 3 divides the gradients by the new scale already."""
    records, expected = of(pair[0], "growing 3"), of(pair[0], "growing 2")
    known = [record["slope"] for record in records if record["slope"] is not None]
    assert 3 <= len(known) < len(records)
    for record, other in zip(records, expected, strict=True):
        assert record["status"] == "found"
        if record["slope"] is not None:
            assert record["slope"] == pytest.approx(other["slope"], rel=0.05)


def test_a_frozen_run_trains_nothing(pair: Ranks) -> None:
    for rank in pair:
        begin, end = rank["frozen"]["begin"]["training"], rank["frozen"]["end"]["training"]
        for part in ("parameters", "stepped"):
            assert end[part] == begin[part]
        records = rank["frozen"]["end"]["records"]
        assert [(r["iteration"], r["status"]) for r in records] == [(2, "found"), (4, "found")]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_measures_what_an_uninterrupted_one_does(stage: int, pair: Ranks) -> None:
    whole, resumed = (pair[0][f"resumed {stage}"][name] for name in ("whole", "resumed"))
    assert resumed["training"]["stepped"] == whole["training"]["stepped"]
    assert untimed(resumed["records"]) == untimed(whole["records"])[-1:]


def test_the_monitor_has_the_curves_against_samples(pair: Ranks) -> None:
    header, *lines = pair[0]["logged"]
    assert [int(line.split(",")[0]) for line in lines] == [16, 48, 80], header
    assert all(float(line.split(",")[1]) > 0 for line in lines)


REASONS = {
    "module": "give the engine",
    "optimizer": "not a torch.optim.Optimizer",
    "inner": "give the optimizer that deepspeed.initialize has returned",
    "parts": "pieces of many parameters",
    "adam_snr": "rows and columns",
    "pipeline_parallelism": "PipelineModule",
    "has_moe_layers": "mixtures of experts",
    "autotp_size": "autotp_size",
    "random_ltd_enabled": "random_ltd",
    "deepcompile": "deepcompile",
    "zero_hpz_partition_size": "zero_hpz_partition_size",
    "zero_quantized_weights": "zero_quantized_weights",
    "offload_optimizer": "NVMe",
    "ZenFlow": "ZenFlowZeroOptimizer of DeepSpeed",
}


def test_what_cannot_be_measured_is_refused(pair: Ranks) -> None:
    reasons = pair[0]["refusals"]
    assert reasons.keys() == REASONS.keys()
    for name, words in REASONS.items():
        assert words in reasons[name]


def test_the_loop_of_the_page_runs(pair: Ranks) -> None:
    records = pair[0]["page"]
    assert [record["iteration"] for record in records] == [0, 20, 40, 60, 80, 100]
    assert all(record["status"] == "found" for record in records)


@pytest.mark.parametrize("name", ["2", "3", "2, bf16, accumulated"])
def test_under_the_trainer_training_is_bit_for_bit_the_same(name: str, trainer: Ranks) -> None:
    for rank in trainer:
        off, on = rank[name]["off"], rank[name]["on"]
        assert on["training"] == off["training"]
        assert on["losses"] == off["losses"]
    records = trainer[0][name]["on"]["records"]
    assert [(r["iteration"], r["status"]) for r in records] == [(i, "found") for i in (2, 4, 6, 8)]
    logged = [line["step"] for line in trainer[0][name]["on"]["logged"]]
    assert logged == [2, 4, 6, 8]


@pytest.mark.parametrize("name", ["2", "3"])
def test_under_the_trainer_the_number_is_that_under_ddp(name: str, trainer: Ranks) -> None:
    records, expected = trainer[0][name]["on"]["records"], trainer[0]["ddp"]["records"]
    for record, other in zip(records, expected, strict=True):
        for key in ("loss", "slope", "update_norm", "critical_lr"):
            assert record[key] == pytest.approx(other[key], rel=1e-3), key
        assert record["tokens"] == other["tokens"]


def test_a_resumed_trainer_measures_what_an_uninterrupted_one_does(trainer: Ranks) -> None:
    whole, resumed = trainer[0]["whole"], trainer[0]["resumed"]
    assert resumed["training"]["stepped"] == whole["training"]["stepped"]
    assert untimed(resumed["records"]) == untimed(whole["records"])[-2:]
