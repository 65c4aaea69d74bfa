"""Megatron-Bridge's ``finetune``: LoRA, batches of unequal lengths, and packed ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.megatron.bridge_runs import check_scan, run_all
from tests.megatron.harness import ROOT, Run, other_data
from tests.megatron.test_bridge import BF16, DISTRIBUTED, OVERLAP, PP, VPP

pytestmark = pytest.mark.timeout(900)  # of the first test, which makes all runs

SFT: dict[str, Any] = {"sft": True}
PACKED = {**SFT, "packed": True}
LORA = {**SFT, **DISTRIBUTED, "lora": {"dim": 4, "alpha": 8, "dropout": 0.1}}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

#: Layout → (processes, case).
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "lora": (2, {**LORA, **BF16, **OVERLAP}),
    "lora tp": (2, {**LORA, "model": TP}),
    "lora packed": (1, {**LORA, "packed": True}),
    "unpacked pp": (2, {**SFT, **DISTRIBUTED, "model": PP}),  # lengths of its own for each step
    "packed": (2, {**PACKED, **OVERLAP, "model": {"calculate_per_token_loss": True}}),
    "packed vpp": (2, {**PACKED, **DISTRIBUTED, "layers": 4, "model": VPP}),
}  # fmt: skip

# Without dropout: on the CPU the data loader draws from the same random state as dropout does.
SCANNED = {"every": 2, "iterations": 2, "dropout": 0.0, "scanned": True}
NO_DROPOUT = {"lora": {**LORA["lora"], "dropout": 0.0}}
NUMBERS: dict[str, tuple[int, dict[str, Any]]] = {
    "lora": (2, {**LORA, **NO_DROPOUT}),
    "lora tp": (2, {**LORA, **NO_DROPOUT, "model": TP}),
    "lora frozen": (1, {**LORA, **NO_DROPOUT, "settings": {"frozen": 1}}),
    "unpacked": (1, SFT),
}
MASTERS = {**DISTRIBUTED["optimizer"], "use_precision_aware_optimizer": True}
#: Without Transformer Engine Megatron loads no other state of its distributed optimizer.
RESUMED: dict[str, tuple[int, dict[str, Any]]] = {
    "lora": (2, {**LORA, **NO_DROPOUT, **BF16, "optimizer": MASTERS}),
    "packed": (1, {**PACKED, "model": {"calculate_per_token_loss": True}}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs, one after the other in forks of one process that has Bridge imported."""
    root = tmp_path_factory.mktemp("finetune")
    others = {"eval_data": {"sums": str(other_data(root))}}
    cases: dict[str, dict[str, Any]] = {}

    def add(name: str, processes: int, case: dict[str, Any], **more: Any) -> None:
        layers = case.get("layers", 2)
        base = {"pretrained_checkpoint": str(root / f"base{layers}")}
        settings = {**case.get("settings", {}), **others}
        checkpoint = {**base, **more.pop("checkpoint", {})}
        cases[name] = {
            "processes": processes, **case, "settings": settings, "checkpoint": checkpoint, **more
        }  # fmt: skip

    for layers in (2, 4):
        save = {"save": str(root / f"base{layers}"), "save_interval": 20}
        cases[f"base {layers}"] = {**SFT, "layers": layers, "iterations": 20, "checkpoint": save}
    for name, (processes, case) in LAYOUTS.items():
        add(f"{name} plain", processes, case, iterations=4)
        add(f"{name} measured", processes, case, iterations=4, every=2)
    for name, (processes, case) in NUMBERS.items():
        add(f"number {name}", processes, case, **SCANNED)
    for name, (processes, case) in RESUMED.items():
        long = {"every": 2, "dropout": 0.0, "iterations": 4}
        checkpoints = str(root / f"{name} checkpoints")
        saving = {"save": checkpoints, "save_interval": 2}
        loading = {**saving, "load": checkpoints}
        add(f"whole {name}", processes, case, **long, scanned=name == "packed")
        add(f"first half {name}", processes, case, **long, checkpoint=saving, exit_interval=2)
        add(f"second half {name}", processes, case, **long, checkpoint=loading)
    cases["snippets"] = {"snippets": str(ROOT / "docs" / "megatron_bridge.md")}
    return run_all(root, cases)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_measured_finetuning_is_bit_for_bit_the_same(layout: str, runs: dict[str, Run]) -> None:
    plain = runs[f"{layout} plain"].expect_success()
    measured = runs[f"{layout} measured"].expect_success()

    assert len(plain.hashes) == LAYOUTS[layout][0]
    assert measured.hashes == plain.hashes
    assert all(rank["parameters"] != rank["parameters before"] for rank in plain.hashes)
    assert plain.training_lines
    assert measured.training_lines == plain.training_lines
    assert [(r["iteration"], r["status"]) for r in measured.records] == [
        (2, "found"), (4, "found")
    ]  # fmt: skip
    assert "differs from the training loss" not in measured.output
    assert measured.records[0]["replay_error"] <= 1e-6
    assert "failed" not in {record["status"] for record in measured.relative_records}
    assert len(measured.relative_records) == 2


@pytest.mark.parametrize("layout", NUMBERS)
def test_critical_lr_stands_between_losses_computed_anew(
    layout: str, runs: dict[str, Run]
) -> None:
    result = runs[f"number {layout}"].expect_success()
    check_scan(result, [(2, "train"), (2, "sums")])


def test_a_packed_batch_is_what_its_sequences_are(runs: dict[str, Run]) -> None:
    names = [(iteration, name) for iteration in (2, 4) for name in ("train", "sums")]
    check_scan(runs["whole packed"].expect_success(), names)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_measurements_are_the_uninterrupted_ones(name: str, runs: dict[str, Run]) -> None:
    whole = runs[f"whole {name}"].expect_success()
    first = runs[f"first half {name}"].expect_success()
    second = runs[f"second half {name}"].expect_success()
    assert {record["iteration"] for record in second.records} == {4}
    assert first.timeless_records + second.timeless_records == whole.timeless_records
    assert [rank["parameters"] for rank in second.hashes] == [
        rank["parameters"] for rank in whole.hashes
    ]


def test_the_base_of_lora_is_frozen(runs: dict[str, Run]) -> None:
    """A frozen run of LoRA leaves the adapters, too."""
    for rank in runs["number lora frozen"].expect_success().hashes:
        assert rank["parameters"] == rank["parameters before"]


def test_the_snippets_of_the_page_run(runs: dict[str, Run]) -> None:
    folder = runs["snippets"].expect_success().folder / "runs"
    for name, batches in (("bridge", ["train"] * 4), ("lora", ["train", "sums"] * 2)):
        lines = (folder / name / "critical_sharpness.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["batch"] for record in records] == batches
        assert "failed" not in {record["status"] for record in records}
