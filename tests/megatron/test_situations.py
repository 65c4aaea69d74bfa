"""The watch by name, the loss that was differentiated, and what ranks must agree on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.megatron.harness import Run, run

BIAS = (
    "--num-experts 4 --expert-model-parallel-size 2 --bf16 --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2"
)
MTP = "--bf16 --position-embedding-type rope --mtp-num-layers 1"

#: Situation → (processes, flags, what the watch names).
NAMED = {
    "nothing_is_put_back": (2, BIAS, ["layers.0.mlp.router.expert_bias"]),
    "tokens_counted_and_nothing_put_back": (
        2, BIAS, ["layers.0.mlp.router.local_tokens_per_expert", "layers.1.mlp.router.expert_bias"]
    ),
    "a_log_that_no_one_knows_of": (1, MTP, ["MTPLossLoggingHelper.tracker["]),
    "attention_logits_that_are_not_put_back": (
        1, "--bf16", ["core_attention.current_max_attn_logits"]
    ),
}  # fmt: skip


def trained(folder: Path, situation: str, flags: str, processes: int, every: int = 2) -> Run:
    environment = {"OBSERVED_SITUATION": situation}
    ran = run(folder, flags, processes=processes, every=every, environment=environment)
    return ran.expect_success()


@pytest.mark.parametrize("situation", NAMED)
def test_the_watch_names_what_a_measurement_has_changed(situation: str, tmp_path: Path) -> None:
    processes, flags, names = NAMED[situation]
    result = trained(tmp_path, situation, flags, processes)
    assert [record["status"] for record in result.records] == ["failed"] * 3
    first, *later = result.records
    assert first["reason"].startswith("the measurement has changed what training reads later: ")
    for name in names:
        assert name in first["reason"], first["reason"]
    assert first["critical_lr"] is None and first["evaluations"] > 0
    assert all(r["reason"] == first["reason"] and r["evaluations"] == 0 for r in later)


def test_small_logs_are_put_back_by_the_watch(tmp_path: Path) -> None:
    """MTP's log is a class attribute that no one here knows of."""
    plain = trained(tmp_path / "plain", "a_log_that_no_one_knows_of", MTP, 1, every=0)
    measured = trained(tmp_path / "measured", "a_log_that_no_one_knows_of", MTP, 1)
    assert measured.hashes == plain.hashes and measured.training_lines == plain.training_lines


@pytest.mark.parametrize(
    ("situation", "flags", "processes"),
    [("attention_logits", "--bf16", 1), ("tokens_counted_in_every_pass", BIAS, 2)],
)
def test_what_modules_keep_is_put_back(
    situation: str, flags: str, processes: int, tmp_path: Path
) -> None:
    plain = trained(tmp_path / "plain", situation, flags, processes, every=0)
    measured = trained(tmp_path / "measured", situation, flags, processes)
    assert measured.hashes == plain.hashes and measured.training_lines == plain.training_lines
    assert [record["status"] for record in measured.records] == ["found"] * 3
    assert "logits:" in plain.output or situation != "attention_logits"


def test_a_watch_that_has_named_something_can_end_the_run(tmp_path: Path) -> None:
    result = run(
        tmp_path, f"{MTP} --critical-sharpness-on-error raise", every=2,
        environment={"OBSERVED_SITUATION": "a_log_that_no_one_knows_of"},
    )  # fmt: skip
    assert result.returncode and "MTPLossLoggingHelper" in result.output


def logged(result: Run, name: str) -> list[float]:
    """Values of the log lines of iterations 4 and 6; Megatron averages the first two."""
    lines = result.training_lines[3::2]
    return [float(re.search(rf"{name}: (\S+)", line)[1]) for line in lines]  # type: ignore[index]


#: Situation → (processes, flags, the entry of Megatron's log that is differentiated, tokens).
LOSSES = {
    "distillation": (2, "--bf16 --use-distributed-optimizer", "total loss", 256),
    "mean_of_two": (1, "--bf16", "both", 8),  # which says no number of tokens: samples
    "uneven_tokens": (1, "--bf16", "mean of means", 4 * 20),
}


@pytest.mark.parametrize("situation", LOSSES)
def test_the_loss_is_the_scalar_that_was_differentiated(situation: str, tmp_path: Path) -> None:
    """Whatever is first in the log; next to θ it falls as the gradient says."""
    processes, flags, name, tokens = LOSSES[situation]
    dropout = "--hidden-dropout 0 --attention-dropout 0"
    result = trained(tmp_path, situation, f"{flags} {dropout}", processes)
    for record, value in zip(result.records[1:], logged(result, name), strict=True):
        assert record["status"] == "found", record["reason"]
        assert record["loss"] == pytest.approx(value, rel=1e-5)
        assert record["tokens"] == tokens and record["replay_error"] == 0.0
        # Known, since it passed the comparison with the loss next to θ.
        assert record["slope"] is not None
    if situation != "uneven_tokens":
        assert record["loss"] != pytest.approx(logged(result, "lm loss")[-1], rel=0.01)


def test_all_tokens_count_alike_where_they_do_in_training(tmp_path: Path) -> None:
    result = trained(tmp_path, "uneven_tokens", "--bf16 --calculate-per-token-loss", 1)
    for record, value in zip(result.records[1:], logged(result, "lm loss"), strict=True):
        assert record["loss"] == pytest.approx(value, rel=1e-5) and record["tokens"] == 80


def test_ranks_whose_gradient_norms_differ_search_alike(tmp_path: Path) -> None:
    flags = "--bf16 --use-distributed-optimizer --clip-grad 0.1"
    plain = run(tmp_path / "plain", flags, processes=2, every=2).expect_success()
    result = trained(tmp_path / "other", "another_norm_on_the_last_rank", flags, 2)
    assert result.timeless_records == plain.timeless_records  # as rank 0 has it
    assert [record["status"] for record in result.records] == ["found"] * 3


def test_weights_that_are_changed_after_the_step_stay(tmp_path: Path) -> None:
    flags = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    plain = trained(tmp_path / "plain", "weights_clamped_after_the_step", flags, 2, every=0)
    measured = trained(tmp_path / "measured", "weights_clamped_after_the_step", flags, 2)
    assert measured.hashes == plain.hashes
    assert [record["status"] for record in measured.records] == ["failed", "failed", "found"]
    for record in measured.records[:2]:  # also where the watch would have begun
        assert "were changed between the optimizer's step" in record["reason"]


@pytest.mark.parametrize("decoupled", ["2e-2", "1e-3"])
def test_the_learning_rate_is_the_one_that_is_logged(decoupled: str, tmp_path: Path) -> None:
    flags = (
        f"--bf16 --decoupled-lr {decoupled} --decoupled-min-lr {decoupled} --lr-decay-style "
        "constant --lr-warmup-iters 0 --untie-embeddings-and-output-weights"
    )
    result = run(tmp_path, flags, every=2).expect_success()
    assert [record["lr"] for record in result.records] == [1e-2] * 3
    assert logged(result, "learning rate") == [1e-2] * 2
