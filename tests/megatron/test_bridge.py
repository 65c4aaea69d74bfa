"""Megatron-Bridge's callback, in Bridge's real ``pretrain``: same training, right numbers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_sharpness.core.measurement import TAGS
from tests.megatron import reference
from tests.megatron.harness import ROOT, Run
from tests.trainers.harness import require

PATHS = [*require("bridge", "megatron.bridge"), *require("hf", "transformers")]

pytestmark = pytest.mark.timeout(600)  # of the first test, which makes all runs

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

STATUSES = {"fp16 with skipped steps": ["skipped_step", "found", "found"]}

ONE_STEP = {
    "weights": "canonical", "every": 1, "iterations": 1, "layers": reference.LAYERS,
    "dropout": 0.0, "warmup": 0, "decay": "constant",
}  # fmt: skip
NUMBERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "dp with distributed optimizer": (2, DISTRIBUTED),
    "tp": (2, {"model": TP}),
    "pp": (2, {"model": PP}),
}

# Without dropout: on the CPU the data loader draws from the same random state as dropout does.
LONG = {"iterations": 8, "every": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs, one after the other in forks of one process that has Bridge imported."""
    root = tmp_path_factory.mktemp("bridge")
    checkpoints = str(root / "checkpoints")
    cases: dict[str, dict[str, Any]] = {}
    for name, (processes, case) in LAYOUTS.items():
        for kind, every in (("plain", 0), ("measured", 2)):
            cases[f"{name} {kind}"] = {"processes": processes, "every": every, **case}
    for name, (processes, case) in NUMBERS.items():
        cases[f"number {name}"] = {"processes": processes, **ONE_STEP, **case}
    saving = {"save": checkpoints, "save_interval": 4}
    cases["whole"] = LONG
    cases["first half"] = {**LONG, "checkpoint": saving, "exit_interval": 4}
    cases["second half"] = {**LONG, "checkpoint": {**saving, "load": checkpoints}}
    cases["refused"] = {"every": 2, "ddp": {"fp8_param_gather": True}}
    folders = {name: root / name.replace(" ", "_") for name in cases}
    described = [{"folder": str(folders[name]), **case} for name, case in cases.items()]
    (root / "cases.json").write_text(json.dumps(described))
    search = os.pathsep.join([str(ROOT), *PATHS])
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.megatron.bridge_worker", root / "cases.json"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = worker.communicate(timeout=570)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        output, _ = worker.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):  # what Bridge has left running
            os.killpg(worker.pid, signal.SIGKILL)
    assert worker.returncode == 0, output[-6000:]
    return {
        name: Run(
            int((folder / "returncode").read_text()),
            "".join(path.read_text() for path in sorted(folder.glob("output*.txt"))),
            folder,
        )
        for name, folder in folders.items()
    }


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
    assert {record["status"] for record in measured.part_records} <= {"found", "no_upper"}


@pytest.fixture(scope="module")
def expected(runs: dict[str, Run]) -> reference.Reference:
    batches = torch.load(
        runs["number one process"].expect_success().folder / "batches.pt", weights_only=False
    )
    return reference.measure(
        {key: torch.cat([b[key] for b in batches]) for key in ("tokens", "labels", "loss_mask")}
    )


@pytest.mark.parametrize("layout", NUMBERS)
def test_critical_lr_is_the_reference(
    layout: str, runs: dict[str, Run], expected: reference.Reference
) -> None:
    (record,) = runs[f"number {layout}"].expect_success().records

    assert record["status"] == "found"
    assert record["loss"] == pytest.approx(expected.loss, rel=2e-6)
    assert record["slope"] == pytest.approx(expected.slope, rel=1e-3)
    assert record["update_norm"] == pytest.approx(expected.update_norm, rel=1e-3)
    assert record["critical_lr_lower"] <= expected.critical_lr <= record["critical_lr_upper"]
    assert record["critical_lr"] == pytest.approx(expected.critical_lr, rel=2e-3)
    assert record["tokens"] == 8 * 32


def test_curves_are_in_bridge_s_own_tensorboard(runs: dict[str, Run]) -> None:
    plain = scalars(runs["dp with overlap plain"].expect_success())
    result = runs["dp with overlap measured"].expect_success()
    measured = scalars(result)

    assert set(measured) - set(plain) == {
        f"{tag}{twin}" for tag in TAGS for twin in ("", " vs samples")
    }
    for tag, values in plain.items():
        if not any(word in tag for word in ("time", "throughput", "TFLOP")):
            assert measured[tag] == values, tag
    for tag, field in TAGS.items():
        assert [step for step, _ in measured[tag]] == [2, 4, 6]
        assert [step for step, _ in measured[f"{tag} vs samples"]] == [16, 32, 48]
        recorded = [record[field] for record in result.records]
        assert [value for _, value in measured[tag]] == pytest.approx(recorded, rel=1e-6)


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
