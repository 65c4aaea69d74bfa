"""Megatron-LM's recipes train bit for bit the same with measurements, where a CPU trains them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron.harness import ROOT, run
from tests.megatron.recipes import results, trial
from tests.megatron.test_checkout import CHECKOUT, checkout

__all__ = ["checkout"]  # a fixture

PAGE = (ROOT / "docs" / "megatron_recipes.md").read_text()


@pytest.mark.skipif(CHECKOUT is None, reason="MEGATRON_LM does not name a Megatron-LM checkout")
@pytest.mark.timeout(7200)
def test_recipes_are_measured_with_training_unchanged(
    checkout: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    chosen = [] if request.config.getoption("all_recipes") else ["--only", "20"]
    subprocess.run(
        [sys.executable, "-m", "tests.megatron.recipes", str(checkout), str(tmp_path), *chosen],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(checkout)])},
        cwd=ROOT, check=True,
    )  # fmt: skip
    groups = results.load(tmp_path / "outcomes.json")["groups"]
    wrong = [group for group in groups if group["outcome"] in ("differs", "failed")]
    assert not wrong, json.dumps(wrong, indent=1)
    assert sum(group["outcome"] == "measured" for group in groups) >= len(groups) / 2


def test_the_page_says_what_the_results_say() -> None:
    assert results.COMMITTED
    for path in results.COMMITTED:
        document = results.load(path)
        assert results.page(document) in PAGE
        counts = results.counts(document)
        assert counts["differs"] == counts["failed"] == 0


def test_no_result_names_a_folder_of_the_machine_that_made_it() -> None:
    for path in results.COMMITTED:
        assert not re.search(r"/(home|root|tmp|work|mnt|Users)/", path.read_text())


def test_what_differs_is_named(tmp_path: Path) -> None:
    flags = "--bf16 --eval-iters 1 --eval-interval 2 --save-interval 2 --save checkpoints"
    one, same, other = (
        run(tmp_path / name, f"{flags} --split 80,10,10 --seed {seed} --train-iters 4")
        .expect_success()
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )  # fmt: skip
    assert trial.differences(one, same) == []
    found = trial.differences(one, other)
    assert {"rank 0: parameters", "rank 0: optimizer", "log"} <= set(found)
    assert any(name.startswith("iter_0000004: optimizer") for name in found)


def test_flags_that_are_refused_are_known_without_a_run() -> None:
    assert trial.refusal({"--bf16": "true", "--tensor-model-parallel-size": "2"}) is None
    refused = trial.refusal({"--perform-rl-step": "true"})
    assert refused is not None and "--perform-rl-step" in refused
