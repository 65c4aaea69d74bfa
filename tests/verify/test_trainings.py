"""``megatron-sharpness verify`` of real trainings: promises that hold, faults that are found."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from benchmarks.verified import CASES, Case, verify
from tests.processes import ROOT

SHORT = ("--iterations", "4", "--every", "2")

#: Begun for each change; the other layouts wait for the rare tests.
FIRST = ("data parallel, overlapped gathers", "launch/fsdp/train.py")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.rare]) for name in CASES],
)
def test_all_promises_hold(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if case.trainer == "Bridge":
        from tests.trainers.harness import require

        require("bridge", "megatron.bridge")
    document = verify(case, tmp_path / "out", *SHORT)
    assert document["status"] == 0, document["promises"]
    comparison = document["comparison"]
    assert comparison["by_itself"] is None and comparison["iterations"] == 4
    assert comparison["log_lines"] == 4 and comparison["values"] > 500
    assert [row["confirmed"] for row in document["measurements"]] == [2, 4]
    for row in document["measurements"]:
        assert row["measured"]["status"] == "found" and row["bisection"]["status"] == "found"
        assert row["passes"] and len(row["passes"]) == len(row["probes"])
    assert document["facts"]["ranks"] == case.processes
    assert document["cost"]["host_memory"]["on"] > 0


ONE = Case("Megatron", 1, "--use-distributed-optimizer")
TWO = CASES["data parallel, overlapped gathers"]
EXPERTS = Case(
    "Megatron", 1,
    "--num-experts 4 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 1e-2 --disable-bias-linear",
)  # fmt: skip

#: Faults → training, which promise fails, and what is said of it.
PLANTED = {
    "restore_left_out,blind": (ONE, "training with measurement is the same",
                               "after iteration 2 on rank 0, in weights[module."),
    "buffer_left_changed,blind": (EXPERTS, "training with measurement is the same",
                                  "expert_bias"),
    "buffer_left_changed": (EXPERTS, "the number is right",
                            "changed what training reads later: "),
    "stale_weights": (TWO, "the number is right", "the loss evaluated at θ is"),
    "wrong_reduction": (TWO, "the number is right", "the training's own log says lm loss"),
}  # fmt: skip


@pytest.mark.rare
@pytest.mark.parametrize("faults", PLANTED)
def test_what_is_broken_is_found(
    faults: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, promise, said = PLANTED[faults]
    monkeypatch.setenv("PLANTED", faults)
    document = verify(_broken(case), tmp_path / "out", *SHORT)
    assert document["status"] == 1
    assert document["promises"][promise].startswith("NO: "), document["promises"]
    assert said in document["promises"][promise]


@pytest.mark.rare
def test_a_training_that_does_not_repeat_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", "clock")
    document = verify(_broken(ONE), tmp_path / "out", *SHORT)
    assert document["status"] == 2, document["promises"]
    first = document["comparison"]["by_itself"]
    assert first["iteration"] == 0
    assert "weights[module.module.decoder.layers.1.mlp.linear_fc1.weight]" in first["names"]
    assert document["promises"]["training with measurement is the same"].startswith("not told: ")


@pytest.mark.rare
def test_from_a_checkpoint_and_without_a_trace(tmp_path: Path) -> None:
    """It goes on from ``--load``, and neither ``--save`` nor TensorBoard's folder is written."""
    folder = tmp_path / "run"
    flags = f"--save {folder}/checkpoints --save-interval 3 --tensorboard-dir {folder}/tensorboard"
    trained = Case("Megatron", 1, f"{flags} --exit-interval 3")
    verify(trained, tmp_path / "before", *SHORT)
    assert not folder.exists()
    _train(trained.command(tmp_path))
    before = sorted(folder.rglob("*"))
    assert any(path.name == "iter_0000003" for path in before)
    loaded = Case("Megatron", 1, f"{flags} --load {folder}/checkpoints")
    document = verify(loaded, tmp_path / "out", *SHORT)
    assert document["status"] == 0, document["promises"]
    assert [row["confirmed"] for row in document["measurements"]] == [4, 6]
    assert sorted(folder.rglob("*")) == before
    shutil.rmtree(folder)


def _train(command: list[str]) -> None:
    import os
    import subprocess

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)


def _broken(case: Case) -> Case:
    return dataclasses.replace(case, script="tests/verify/broken_pretrain.py")
