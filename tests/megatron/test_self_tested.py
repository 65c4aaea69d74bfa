"""Modes that nobody could run on their hardware here, against stand-ins: bit for bit and exact, and
without what is done for them ended by the run's own self-test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_sharpness.megatron.engine import FIRST_PASS
from megatron_sharpness.megatron.shards.gathers import Stepped
from tests.megatron.harness import Run, other_data, run
from tests.megatron.test_bitwise import OVERLAP, RECOMPUTE

DELAYED = "--fp8-format hybrid --fp8-recipe delayed"
TENSORWISE = "--fp8-format hybrid --fp8-recipe tensorwise"
SAID = "self-tested in this run: "

#: Name → (situation, processes, flags, mode).
QUANTIZED = {
    "delayed": ("fp8_delayed", 1, f"--bf16 {DELAYED}", "fp8 delayed"),
    "delayed fp32": ("fp8_delayed", 1, DELAYED, "fp8 delayed"),
    "delayed before 2.16": ("fp8_delayed_before_2_16", 1, f"--bf16 {DELAYED}", "fp8 delayed"),
    "delayed recompute": ("fp8_delayed", 1, f"--bf16 {DELAYED} {RECOMPUTE}", "fp8 delayed"),
    "delayed overlap": (
        "fp8_delayed", 2, f"{DELAYED} {OVERLAP} --use-distributed-optimizer", "fp8 delayed"
    ),
    "delayed vpp": (
        "fp8_delayed", 2, f"--bf16 {DELAYED} --pipeline-model-parallel-size 2 --num-layers 4 "
        "--num-layers-per-virtual-pipeline-stage 1", "fp8 delayed",
    ),
    "tensorwise": ("fp8_tensorwise", 1, f"--bf16 {TENSORWISE}", "fp8 tensorwise"),
}  # fmt: skip

COMMON = {"delayed", "delayed recompute", "tensorwise"}


def trained(folder: Path, situation: str, flags: str, processes: int = 1, **options: Any) -> Run:
    environment = {"OBSERVED_SITUATION": situation, **options.pop("environment", {})}
    ran = run(folder, flags, processes=processes, environment=environment, **options)
    return ran.expect_success()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in COMMON else pytest.mark.rare) for n in QUANTIZED]
)
def test_quantized_training_is_bit_for_bit_the_same_and_its_replay_exact(
    name: str, tmp_path: Path
) -> None:
    situation, processes, flags, mode = QUANTIZED[name]
    others = f"--critical-sharpness-eval-data sums={other_data(tmp_path)}"
    plain = trained(tmp_path / "plain", situation, flags, processes)
    measured = trained(
        tmp_path / "measured", situation, f"{flags} {others} --critical-sharpness-watch always",
        processes, every=2,
    )  # fmt: skip
    assert measured.hashes == plain.hashes and measured.training_lines == plain.training_lines
    assert [record["status"] for record in measured.records] == ["found"] * 3
    for record in measured.all_records:
        assert record["self_tested"] == mode
    for record in measured.records:
        assert record["replay_error"] <= 1e-14 and record["loss"] > 5
    assert measured.output.count(SAID + mode) == 1


@pytest.mark.parametrize(
    ("fault", "flags", "seen"),
    [
        ("scales_that_stay", DELAYED, "self-test of fp8 delayed: the loss evaluated at θ"),
        ("scales_that_stay", f"{DELAYED} {RECOMPUTE}", "self-test of fp8 delayed"),
        ("quantization_that_is_not_put_back", DELAYED, "amax_history"),
    ],
)
def test_without_what_is_done_for_it_measuring_ends_and_training_goes_on(
    fault: str, flags: str, seen: str, tmp_path: Path
) -> None:
    plain = trained(tmp_path / "plain", "fp8_delayed", f"--bf16 {flags}")
    ended = trained(
        tmp_path / "ended", "fp8_delayed", f"--bf16 {flags}", every=2,
        environment={"OBSERVED_FAULT": fault},
    )  # fmt: skip
    assert ended.hashes == plain.hashes and ended.training_lines == plain.training_lines
    first, *later = ended.records
    assert seen in first["reason"], first["reason"]
    for record in ended.records:
        assert (record["status"], record["self_tested"]) == ("failed", None)
        assert record["critical_lr"] is None and record["reason"] == first["reason"]
    assert all(record["evaluations"] == 0 for record in later)
    if fault == "scales_that_stay":  # and a wider tolerance would have believed it
        assert 1e-12 < first["replay_error"] < 1e-4
    assert SAID not in ended.output


def test_a_pass_that_makes_its_scales_is_not_measured_and_the_next_one_is(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", "fp8_delayed", f"--bf16 {DELAYED}")
    flags = f"--bf16 {DELAYED} --critical-sharpness-on-error raise"
    measured = trained(tmp_path / "measured", "fp8_delayed", flags, every=1)
    assert measured.hashes == plain.hashes
    first, *later = measured.records
    assert (first["status"], first["reason"]) == ("skipped_step", FIRST_PASS)
    assert {record["status"] for record in later} == {"found"}


def test_a_resumed_run_tests_itself_anew(tmp_path: Path) -> None:
    flags = f"--bf16 {DELAYED} --ckpt-format torch"
    saved = f"{flags} --save {tmp_path / 'saved'} --save-interval 4 --exit-interval 4"
    first = trained(tmp_path / "first", "fp8_delayed", saved, every=2)
    again = trained(
        tmp_path / "again", "fp8_delayed", f"{flags} --load {tmp_path / 'saved'}", every=1
    )
    assert SAID in first.output and SAID in again.output
    assert [(r["iteration"], r["status"]) for r in again.records] == [
        (5, "skipped_step"), (6, "found")
    ]  # fmt: skip


STEADY = "--bf16 --hidden-dropout 0 --attention-dropout 0 --no-check-for-nan-in-loss-and-grad"
WHOLE = "--cuda-graph-impl full_iteration"
SGD = "--optimizer sgd --lr-decay-style constant --lr-warmup-iters 0 --clip-grad 0"

#: Name → (flags of the training, flags of its graphs, mode).
GRAPHS = {
    "full iteration": (STEADY, WHOLE, "CUDA graphs full_iteration"),
    "local": (STEADY, "--cuda-graph-impl local", "CUDA graphs local"),
    "transformer engine": (
        STEADY, "--cuda-graph-impl transformer_engine", "CUDA graphs transformer_engine"
    ),
    "optimizer": (f"{STEADY} {SGD}", "--optimizer-cuda-graph", "CUDA graph of the optimizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_change_nothing_of_training_and_nothing_of_the_numbers(
    name: str, tmp_path: Path
) -> None:
    training, graphs, mode = GRAPHS[name]
    graphs = f"{training} {graphs} --cuda-graph-warmup-steps 1"
    plain = trained(tmp_path / "plain", "cuda_graphs", graphs)
    without = run(tmp_path / "without", training, every=2).expect_success()
    for part in ("parameters", "gradients", "optimizer"):  # the stand-in is one
        assert plain.hashes[0][part] == without.hashes[0][part]
    measured = trained(
        tmp_path / "measured", "cuda_graphs", f"{graphs} --critical-sharpness-watch always", every=2
    )
    assert measured.hashes == plain.hashes and measured.training_lines == plain.training_lines
    assert measured.output.count(SAID + mode) == 1
    same = [{**record, "self_tested": mode} for record in without.timeless_records]
    assert measured.timeless_records == same


def test_a_graph_of_the_optimizer_leaves_its_gradients_in_the_buffer() -> None:
    main, model = torch.zeros(3), torch.zeros(3)
    buffered = torch.ones(3)
    stepped = Stepped.of(main, model, buffered, main)
    assert stepped.gradient is buffered and stepped.clipped  # in place
    assert not Stepped.of(main, model, buffered.bfloat16(), main).clipped  # a copy of it was
    main.grad = torch.ones(3)
    stepped = Stepped.of(main, model, buffered, main)
    assert stepped.gradient is main.grad and stepped.clipped


@pytest.mark.parametrize("name", ["full iteration", "transformer engine"])
def test_probes_through_the_graphs_of_training_are_not_believed(name: str, tmp_path: Path) -> None:
    training, graphs, _ = GRAPHS[name]
    flags = f"{training} {graphs} --cuda-graph-warmup-steps 1"
    ended = trained(
        tmp_path, "cuda_graphs", flags, every=2, environment={"OBSERVED_FAULT": "probes_by_graphs"}
    )
    assert {record["status"] for record in ended.records} == {"failed"}
    assert {record["critical_lr"] for record in ended.records} == {None}
    assert SAID not in ended.output


def test_a_pass_that_puts_weights_back_is_seen_though_the_loss_at_the_start_is_exact(
    tmp_path: Path,
) -> None:
    plain = trained(tmp_path / "plain", "fp8_tensorwise", f"--bf16 {TENSORWISE}")
    ended = trained(
        tmp_path / "ended", "fp8_tensorwise", f"--bf16 {TENSORWISE}", every=2,
        environment={"OBSERVED_FAULT": "weights_held_elsewhere"},
    )  # fmt: skip
    assert ended.hashes == plain.hashes
    for record in ended.records:
        assert record["status"] == "failed" and record["critical_lr"] is None
        assert "a forward pass has changed the weights" in record["reason"]
        assert record["replay_error"] == 0.0
