"""accelerate's FSDP2 in a loop of one's own: its model and optimizer are measured as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT

from .harness import Ranks, check_records, require, untimed, worker_fixture

PATHS = require("hf", "accelerate")

pair = worker_fixture("accelerate_worker", "pair", 2, PATHS)


def test_training_is_bit_for_bit_the_same(pair: Ranks) -> None:
    for rank in pair:
        assert rank["on"]["digest"] == rank["off"]["digest"]
        assert rank["on"]["losses"] == rank["off"]["losses"]
    assert pair[0]["off"]["digest"] != pair[1]["off"]["digest"]  # each has its own shards


def test_records_agree_with_the_definitions(pair: Ranks) -> None:
    check_records(pair[0]["on"], [2, 4, 6])


def test_a_resumed_run_measures_the_same(pair: Ranks) -> None:
    """Registered for accelerate's checkpoints, as its documentation says."""
    assert untimed(pair[0]["resumed"]["records"]) == untimed(pair[0]["on"]["records"])[1:]
    for rank in pair:
        assert rank["resumed"]["digest"] == rank["on"]["digest"]


def test_the_loop_of_the_page_runs(tmp_path: Path) -> None:
    section = (ROOT / "docs" / "huggingface.md").read_text().split("## accelerate")[1]
    snippet = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert snippet is not None
    search = os.pathsep.join([str(ROOT), *PATHS])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", snippet[1]],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs/accelerate/critical_sharpness.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["iteration"], r["status"]) for r in records] == [(i, "found") for i in (10, 20, 30)]
