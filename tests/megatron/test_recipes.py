"""Megatron-LM's own recipes start on the CPU backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron.harness import ROOT
from tests.megatron.recipes import recipes, refusal
from tests.megatron.test_checkout import CHECKOUT, checkout

__all__ = ["checkout"]  # a fixture

pytestmark = pytest.mark.skipif(
    CHECKOUT is None, reason="MEGATRON_LM does not name a Megatron-LM checkout"
)


@pytest.mark.timeout(3600)
def test_nine_of_ten_recipes_start(checkout: Path, tmp_path: Path) -> None:
    search = os.pathsep.join([str(ROOT), str(checkout)])
    subprocess.run(
        [sys.executable, "-m", "tests.megatron.recipes", str(checkout), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": search}, cwd=ROOT, check=True,
    )  # fmt: skip
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert len(outcomes) == sum(refusal(recipe) is None for recipe in recipes(checkout)) > 100
    failed = {name: error for name, error in outcomes.items() if error}
    assert len(failed) <= len(outcomes) / 10, failed
