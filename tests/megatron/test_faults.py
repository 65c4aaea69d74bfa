"""A fault inside a measurement costs that measurement: the training ends as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron.harness import other_data, run
from tests.megatron.test_bitwise import FSDP2, FULLY, OVERLAP

DP = (2, "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")
BUCKETS = (2, f"{DP[1]} --ddp-bucket-size 5000")
TP = (2, "--tensor-model-parallel-size 2 --bf16")
PP = (2, "--pipeline-model-parallel-size 2 --bf16")

FSDP = (2, f"{FULLY} {OVERLAP}")
FSDP2_TWO = (2, f"{FSDP2} --bf16")

#: Fault → (layout, where the reason says it happened).
FAULTS = {
    "exception_on_last_rank": (DP, "rank 1: RuntimeError: injected"),
    "exception_in_forward_on_last_rank": (BUCKETS, "rank 1: RuntimeError: injected"),
    "exception_after_forward_on_last_rank": (TP, "rank 1: RuntimeError: injected"),
    "out_of_memory_in_snapshot": (DP, "rank 0: OutOfMemoryError: injected"),
    "out_of_memory_in_kept_state": (DP, "rank 0: OutOfMemoryError: injected"),
    "out_of_memory_in_move": (TP, "rank 0: OutOfMemoryError: injected"),
}


#: Those under Megatron-FSDP, where all ranks wait for one another in each layer.
SHARDED_FAULTS = (
    "exception_in_forward", "exception_after_forward_on_last_rank", "out_of_memory_in_snapshot",
    "out_of_memory_in_move",
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "fault", "reason"),
    [
        *((layout, fault, reason) for fault, (layout, reason) in FAULTS.items()),
        *((FSDP, fault, "injected") for fault in SHARDED_FAULTS),
        *((FSDP2_TWO, fault, "injected") for fault in SHARDED_FAULTS),
    ],
)
def test_a_fault_on_one_rank_is_given_up_by_all_and_training_goes_on(
    layout: tuple[int, str], fault: str, reason: str, tmp_path: Path
) -> None:
    processes, flags = layout
    plain = run(tmp_path / "plain", flags, processes=processes).expect_success()
    faulty = run(
        tmp_path / "faulty", flags, processes=processes, every=2,
        environment={"OBSERVED_FAULT": fault},
    ).expect_success()  # fmt: skip
    assert faulty.hashes == plain.hashes
    failed = [record for record in faulty.records if record["status"] == "failed"]
    assert len(failed) == 1 and reason in failed[0]["reason"], faulty.records
    assert failed[0]["critical_sharpness"] is None
    assert [record["status"] for record in faulty.records].count("found") == 2
    assert faulty.output.count("injected") == 1  # reported once


def test_an_exception_on_the_last_pipeline_stage_is_given_up_by_all(tmp_path: Path) -> None:
    processes, flags = PP
    plain = run(tmp_path / "plain", flags, processes=processes).expect_success()
    faulty = run(
        tmp_path / "faulty", flags, processes=processes, every=2,
        environment={"OBSERVED_FAULT": "exception_after_forward_on_last_rank"},
    ).expect_success()  # fmt: skip
    assert faulty.hashes == plain.hashes
    assert [record["status"] for record in faulty.records].count("failed") == 1


def test_a_fault_on_other_data_costs_the_measurements_of_other_data(tmp_path: Path) -> None:
    processes, flags = TP
    plain = run(tmp_path / "plain", flags, processes=processes).expect_success()
    others = f"--critical-sharpness-eval-data sums={other_data(tmp_path)}"
    faulty = run(
        tmp_path / "faulty", f"{flags} {others}", processes=processes, every=2,
        environment={"OBSERVED_FAULT": "exception_in_evaluation_on_last_rank"},
    ).expect_success()  # fmt: skip
    assert faulty.hashes == plain.hashes
    assert [record["status"] for record in faulty.records] == ["found"] * 3
    failed = [record for record in faulty.relative_records if record["status"] == "failed"]
    assert [record["iteration"] for record in failed] == [4]
    assert "rank 1: RuntimeError: injected" in failed[0]["reason"]


def test_a_failure_can_be_made_fatal(tmp_path: Path) -> None:
    processes, flags = DP
    result = run(
        tmp_path, f"{flags} --critical-sharpness-on-error raise", processes=processes, every=2,
        environment={"OBSERVED_FAULT": "exception_on_last_rank"},
    )  # fmt: skip
    assert result.returncode != 0
    assert "hung" not in result.output
    assert "ProbeError: rank 1: RuntimeError: injected" in result.output
    assert result.records[-1]["status"] == "failed"


def test_nan_losses_far_out_are_above(tmp_path: Path) -> None:
    flags = "--bf16 --use-distributed-optimizer"
    plain = run(tmp_path / "plain", flags).expect_success()
    # At 10^30 every weight overflows; Megatron's check for NaN losses is on, as by default.
    measured = run(
        tmp_path / "measured",
        f"{flags} --critical-sharpness-initial-guess 1e30 --critical-sharpness-max-evaluations 200",
        every=2,
    ).expect_success()
    assert measured.hashes == plain.hashes
    assert {record["status"] for record in measured.records} <= {"found", "no_lower"}


def test_a_router_that_would_iterate_for_ever_far_out_ends(tmp_path: Path) -> None:
    """Megatron's Sinkhorn loop ends where it has converged, and at such weights it never has."""
    flags = (
        "--num-experts 4 --moe-router-load-balancing-type sinkhorn --moe-router-topk 1 "
        "--disable-bias-linear --bf16"
    )
    plain = run(tmp_path / "plain", flags).expect_success()
    measured = run(
        tmp_path / "measured", f"{flags} --critical-sharpness-initial-guess 30", every=2
    ).expect_success()
    assert measured.hashes == plain.hashes
    assert [record["status"] for record in measured.records] == ["found"] * 3


def test_a_loss_that_does_not_repeat_is_reported(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", "").expect_success()
    noisy = run(
        tmp_path / "noisy", "", every=2, environment={"OBSERVED_FAULT": "non_repeating_loss"}
    ).expect_success()
    assert noisy.hashes == plain.hashes
    assert noisy.output.count("differs from the training loss") == 1


def test_sigterm_during_a_probe_ends_the_run_as_megatron_would(tmp_path: Path) -> None:
    flags = "--bf16 --use-distributed-optimizer --exit-signal-handler"
    plain = run(
        tmp_path / "plain", "--bf16 --use-distributed-optimizer --exit-interval 4", processes=2
    ).expect_success()
    ended = run(
        tmp_path / "ended", flags, processes=2, every=2,
        environment={"OBSERVED_FAULT": "sigterm_during_probe"},
    )  # fmt: skip
    assert "hung" not in ended.output
    assert [record["iteration"] for record in ended.records] == [2, 4]
    assert [record["status"] for record in ended.records] == ["found", "found"]
    assert ended.hashes == plain.hashes


def test_a_dead_rank_ends_the_run_as_in_training(tmp_path: Path) -> None:
    processes, flags = DP
    ended = run(
        tmp_path, flags, processes=processes, every=2,
        environment={"OBSERVED_FAULT": "death_of_last_rank"},
    )  # fmt: skip
    assert ended.returncode != 0
    assert "hung" not in ended.output
