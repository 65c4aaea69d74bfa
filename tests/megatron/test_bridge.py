"""Megatron-Bridge's callback, in Bridge's real ``pretrain``: same training, right numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sharpness.core.measurement import OVER, RELATIVE_TAGS, TAGS
from tests.megatron import reference
from tests.megatron.bridge_runs import check_scan, run_all
from tests.megatron.harness import Run, other_data, run
from tests.megatron.test_number import ONE_STEP as ONE_STEP_OF_MEGATRON
from tests.megatron.test_number import check_moments

pytestmark = pytest.mark.timeout(900)  # of the first test, which makes all runs

BF16 = {
    "model": {"bf16": True, "params_dtype": "bfloat16", "pipeline_dtype": "bfloat16"},
    "precision": {"bf16": True, "params_dtype": "bfloat16"},
}
FP16 = {
    "model": {"fp16": True, "params_dtype": "float16"},
    "precision": {"fp16": True, "params_dtype": "float16", "initial_loss_scale": 2.0**21,
                  "hysteresis": 1},
}  # fmt: skip
DISTRIBUTED = {
    "optimizer": {"use_distributed_optimizer": True},
    "ddp": {"use_distributed_optimizer": True},
}
OVERLAP = {
    **DISTRIBUTED,
    "ddp": {"use_distributed_optimizer": True, "overlap_grad_reduce": True,
            "overlap_param_gather": True},
}  # fmt: skip
SHARDED = {
    **DISTRIBUTED,
    "ddp": {"use_megatron_fsdp": True, "use_distributed_optimizer": True,
            "data_parallel_sharding_strategy": "optim_grads_params",
            "overlap_grad_reduce": True, "overlap_param_gather": True,
            "gradient_reduce_div_fusion": False},  # whose sum is NCCL's only
}  # fmt: skip
PP = {"pipeline_model_parallel_size": 2, "pipeline_dtype": "float32"}
#: Between two stages, batched sends over gloo mix up activations and gradients.
VPP = {**PP, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True,
       "batch_p2p_comm": False}  # fmt: skip
TP = {"tensor_model_parallel_size": 2}

#: Layout → (processes, case).
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (1, {}),
    "fp16 with skipped steps": (1, FP16),
    "eval mode": (1, {"settings": {"mode": "eval", "offload": "cpu"}, **BF16}),
    "dp with overlap": (2, {**BF16, **OVERLAP}),
    "tp with sequence parallelism": (
        2, {**BF16, **DISTRIBUTED, "model": {**BF16["model"], **TP, "sequence_parallel": True}},
    ),
    "vpp": (2, {"layers": 4, "model": VPP, **DISTRIBUTED, "settings": {"parts": "layers"}}),
    "fsdp": (2, {**BF16, **SHARDED}),
    "fsdp optim": (2, {**BF16, **SHARDED, "ddp": {
        **SHARDED["ddp"], "data_parallel_sharding_strategy": "optim",
        "overlap_grad_reduce": False, "overlap_param_gather": False}}),
    "cp": (2, {**BF16, "model": {**BF16["model"], "context_parallel_size": 2}}),
    "masters in the optimizer": (2, {**BF16, **OVERLAP, "optimizer": {
        **BF16.get("optimizer", {}), **DISTRIBUTED["optimizer"],
        "use_precision_aware_optimizer": True}}),
    "qk-clip": (
        1, {**BF16, "model": {**BF16["model"], "qk_clip": True, "qk_clip_threshold": 0.01}},
    ),
}  # fmt: skip

#: Of other data, named so in all runs.
RELATIVE = {f"{tag}/sums": TAGS[tag] for tag in RELATIVE_TAGS}

STATUSES = {"fp16 with skipped steps": ["skipped_step", "found", "found"]}

ONE_STEP = {
    "weights": "canonical", "every": 1, "iterations": 1, "layers": reference.LAYERS,
    "dropout": 0.0, "warmup": 0, "decay": "constant",
}  # fmt: skip
#: Bridge fuses the cross-entropy, whose gradients are in bf16 then, whatever the model is in.
IN_FP32 = {"cross_entropy_loss_fusion": False}
NUMBERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "dp with distributed optimizer": (2, DISTRIBUTED),
    "tp": (2, {"model": TP}),
    "pp": (2, {"model": PP}),
}

#: Name → (case, what is said before the first step).
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "frozen and saved": (
        {"settings": {"frozen": 2}, "checkpoint": {"save": "/no/such"}},
        "frozen=2: nothing is trained that could be saved; set checkpoint.save to None.",
    ),
    "samples": (
        {"settings": {"eval_samples": 3}},
        "eval_samples=3: all data-parallel ranks together take 2 at a time",
    ),
    "no second moments": (
        {"settings": {"adam_snr": True}, "optimizer": {"optimizer": "sgd"}},
        "adam_snr=True: the optimizer sgd keeps no second moments",
    ),
    "too few": (
        {"settings": {"eval_samples": 400}},
        "lines, and 400 samples are asked for; give more, or fewer eval_samples.",
    ),
}
#: Settings, and what is said when the callback is made.
SETTINGS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"eval_data": {"code": "/no/such"}}, "eval_data code=/no/such: there is no /no/such.bin"),
    ({"eval_data": {"train": "/no/such"}}, "'train' is the step's own batch"),
    ({"frozen": -1}, "frozen=-1: a number of steps"),
    ({"frozen": 2, "every": 0}, "frozen=2: every=0 measures nothing"),
]

#: Six steps from the canonical weights, each taken back.
FROZEN = {**ONE_STEP, "every": 2, "iterations": 6}

# Without dropout: on the CPU the data loader draws from the same random state as dropout does.
LONG = {"iterations": 8, "every": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs, one after the other in forks of one process that has Bridge imported."""
    root = tmp_path_factory.mktemp("bridge")
    checkpoints = str(root / "checkpoints")
    others = {"eval_data": {"sums": str(other_data(root))}}
    cases: dict[str, dict[str, Any]] = {}
    for name, (processes, case) in LAYOUTS.items():
        for kind, every in (("plain", 0), ("measured", 2)):
            settings = {"adam_snr": True, **case.get("settings", {}), **others}
            cases[f"{name} {kind}"] = {
                "processes": processes, "every": every, **case, "settings": settings
            }  # fmt: skip
    for name, (processes, case) in NUMBERS.items():
        cases[f"number {name}"] = {
            "processes": processes, **ONE_STEP, **case, "settings": {"adam_snr": True, **others},
            "model": {**case.get("model", {}), **IN_FP32},
        }  # fmt: skip
    frozen = {"processes": 2, **FROZEN, "settings": {"frozen": 2, **others}}
    cases["frozen"] = {**frozen, **DISTRIBUTED, "scanned": True}
    cases["frozen vpp"] = {**frozen, **OVERLAP, "model": VPP, "dropout": 0.1}
    cases["frozen and left"] = {
        **frozen, "processes": 1, "exit_interval": 4, "documents": 15
    }  # fmt: skip
    saving = {"save": checkpoints, "save_interval": 4}
    cases["whole"] = long = {**LONG, "settings": {"adam_snr": True}}
    cases["first half"] = {**long, "checkpoint": saving, "exit_interval": 4}
    cases["second half"] = {**long, "checkpoint": {**saving, "load": checkpoints}}
    cases["refused"] = {"every": 2, "ddp": {"fp8_param_gather": True}}
    for name, (case, _) in REFUSED.items():
        settings = {**case["settings"], **others}
        cases[f"refused {name}"] = {"every": 2, **case, "settings": settings}
    cases["settings"] = {"refused": [settings for settings, _ in SETTINGS_REFUSED]}
    return run_all(root, cases)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_measured_training_is_bit_for_bit_the_same(layout: str, runs: dict[str, Run]) -> None:
    plain = runs[f"{layout} plain"].expect_success()
    measured = runs[f"{layout} measured"].expect_success()

    assert len(plain.hashes) == LAYOUTS[layout][0]
    assert measured.hashes == plain.hashes
    assert plain.training_lines
    assert measured.training_lines == plain.training_lines
    assert [(r["iteration"], r["consumed_samples"], r["status"]) for r in measured.records] == list(
        zip((2, 4, 6), (16, 32, 48), STATUSES.get(layout, ["found"] * 3), strict=True)
    )
    assert "differs from the training loss" not in measured.output
    said = "critical sharpness: verdict: too few measurements to tell"
    assert measured.output.count(said) == 1
    thirds = ["first-third", "middle-third", "last-third", "outside"] if layout == "vpp" else []
    assert [record["part"] for record in measured.part_records] == thirds * 3
    assert [(r["iteration"], r["batch"]) for r in measured.relative_records] == [
        (iteration, "sums") for iteration in (2, 4, 6)
    ]
    assert "failed" not in {record["status"] for record in measured.relative_records}
    assert {record["status"] for record in measured.part_records} <= {"found", "no_upper"}
    for record in measured.records:
        assert bool(record["adam_snr"]) == (record["status"] == "found")


@pytest.fixture(scope="module")
def expected(runs: dict[str, Run]) -> reference.Reference:
    batches = torch.load(
        runs["number one process"].expect_success().folder / "batches.pt", weights_only=False
    )
    return reference.measure(
        {key: torch.cat([b[key] for b in batches]) for key in ("tokens", "labels", "loss_mask")},
        reference.other_batch(other_data(runs["number one process"].folder)),
    )


@pytest.mark.parametrize("layout", NUMBERS)
def test_critical_lr_is_the_reference(
    layout: str, runs: dict[str, Run], expected: reference.Reference
) -> None:
    (record,) = runs[f"number {layout}"].expect_success().records

    assert record["status"] == "found"
    assert record["loss"] == pytest.approx(expected.loss, rel=2e-6)
    assert record["slope"] == pytest.approx(expected.slope, rel=1e-5)
    assert record["update_norm"] == pytest.approx(expected.update_norm, rel=1e-3)
    assert record["critical_lr_lower"] <= expected.critical_lr <= record["critical_lr_upper"]
    assert record["critical_lr"] == pytest.approx(expected.critical_lr, rel=2e-3)
    assert record["tokens"] == 8 * 32
    check_moments(record["adam_snr"], expected.adam_snr, rel=1e-4)

    (relative,) = runs[f"number {layout}"].relative_records
    assert relative["status"] == "found"
    assert relative["critical_lr_lower"] <= expected.relative_critical_lr
    assert expected.relative_critical_lr <= relative["critical_lr_upper"]
    error = relative["critical_lr"] / expected.relative_critical_lr - 1
    assert abs(error) <= 2 * relative["critical_lr_error"] < 0.05
    assert 0 < relative["tokens"] < 8 * 20  # the answers alone


def test_megatron_lm_measures_the_same(runs: dict[str, Run], tmp_path: Path) -> None:
    """With the same weights, files and seed, in a frozen run."""
    others = f"--critical-sharpness-eval-data sums={other_data(tmp_path)}"
    model = ONE_STEP_OF_MEGATRON.replace("--train-iters 1", "--train-iters 6")
    theirs = run(
        tmp_path, f"{others} --use-distributed-optimizer --critical-sharpness-frozen 2",
        processes=2, every=2, model=model, environment={"OBSERVED_FAULT": "canonical"},
    ).expect_success()  # fmt: skip
    ours = runs["frozen"].expect_success()

    assert [(r["iteration"], r["batch"]) for r in ours.all_records] == [
        (4, "train"), (4, "sums"), (6, "train"), (6, "sums")
    ]  # fmt: skip
    for record, other in zip(ours.all_records, theirs.all_records, strict=True):
        assert record["status"] == other["status"] == "found"
        assert record["loss"] == other["loss"]
        assert record["tokens"] == other["tokens"]
        # An Adam step is about g/|g|: where a gradient is next to 0, the order of a sum turns it.
        assert record["critical_lr"] == pytest.approx(other["critical_lr"], rel=5e-3)
        assert record["update_norm"] == pytest.approx(other["update_norm"], rel=1e-3)
    assert fingerprint(ours) == fingerprint(theirs)


@pytest.mark.parametrize("name", ["frozen", "frozen vpp", "frozen and left"])
def test_a_frozen_run_trains_nothing_and_measures(name: str, runs: dict[str, Run]) -> None:
    result = runs[name].expect_success()

    for rank in result.hashes:
        assert rank["parameters"] == rank["parameters before"]
    due = [4] if name == "frozen and left" else [4, 6]
    assert [(r["iteration"], r["status"]) for r in result.records] == [(i, "found") for i in due]
    assert "verdict" not in result.output
    assert len(fingerprint(result)) == 64


def fingerprint(result: Run) -> str:
    """What a frozen run says that parameters and buffers still are."""
    (said,) = re.findall("parameters and buffers are what they were, sha256 (.+?) ", result.output)
    return str(said)


def test_a_frozen_step_is_the_line_that_the_optimizer_went(runs: dict[str, Run]) -> None:
    check_scan(runs["frozen"].expect_success(), [(4, "train"), (4, "sums"), (6, "train"),
                                                 (6, "sums")])  # fmt: skip


def test_other_data_are_one_document_each(runs: dict[str, Run]) -> None:
    """Also where attention does not reach from one document of the training batch into another."""
    result = runs["frozen and left"].expect_success()
    (record,) = result.relative_records
    other = reference.other_batch(other_data(result.folder), end=14)
    loss = reference.loss(reference.parameters(), other).item()
    assert record["loss"] == pytest.approx(loss, rel=2e-6)


def test_curves_are_in_bridge_s_own_tensorboard(runs: dict[str, Run]) -> None:
    plain = scalars(runs["dp with overlap plain"].expect_success())
    result = runs["dp with overlap measured"].expect_success()
    measured = scalars(result)

    moments = {
        f"adam-snr/{kind}/{over}" for kind in result.records[0]["adam_snr"] for over in OVER
    }
    assert len(moments) == 6 * len(OVER)
    assert set(measured) - set(plain) == {
        f"{tag}{twin}" for tag in (*TAGS, *RELATIVE, *moments) for twin in ("", " vs samples")
    }
    for tag, values in plain.items():
        if not any(word in tag for word in ("time", "throughput", "TFLOP")):
            assert measured[tag] == values, tag
    for tag, field in TAGS.items():
        assert [step for step, _ in measured[tag]] == [2, 4, 6]
        assert [step for step, _ in measured[f"{tag} vs samples"]] == [16, 32, 48]
        recorded = [record[field] for record in result.records]
        assert [value for _, value in measured[tag]] == pytest.approx(recorded, rel=1e-6)
    for tag, field in RELATIVE.items():
        recorded = [record[field] for record in result.relative_records]
        there = [value for value in recorded if value is not None]
        assert len(there) > 1
        assert [value for _, value in measured[tag]] == pytest.approx(there, rel=1e-6)


def scalars(result: Run) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_resumed_measurements_are_the_uninterrupted_ones(runs: dict[str, Run]) -> None:
    whole = runs["whole"].expect_success()
    first, second = runs["first half"].expect_success(), runs["second half"].expect_success()
    assert [record["iteration"] for record in second.records] == [6, 8]
    assert first.timeless_records + second.timeless_records == whole.timeless_records


def test_what_cannot_be_measured_is_refused_before_the_first_step(runs: dict[str, Run]) -> None:
    refused = runs["refused"]
    assert refused.returncode != 0
    assert "InputError" in refused.output
    assert "--fp8-param-gather True" in refused.output
    assert not refused.training_lines


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_before_the_first_step(
    name: str, runs: dict[str, Run]
) -> None:
    refused = runs[f"refused {name}"]
    assert refused.returncode != 0
    assert REFUSED[name][1] in refused.output
    assert not refused.training_lines


def test_settings_that_cannot_be_used_are_refused_at_once(runs: dict[str, Run]) -> None:
    said = runs["settings"].expect_success().output
    lines = re.findall("^refused: (.+)$", said, re.MULTILINE)
    assert len(lines) == len(SETTINGS_REFUSED)
    for line, (_, reason) in zip(lines, SETTINGS_REFUSED, strict=True):
        assert reason in line
        assert "--critical-sharpness" not in line
