"""``launch/gpu_check.sh`` without a GPU: the same parts, at a small size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT


def test_all_parts_run_on_the_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "launch" / "gpu_check.sh", "--out", tmp_path / "out", "--minutes", "20"],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("no GPU is seen: ")
    document = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert document["machine"] and document["versions"]["torch"]
    parts = document["parts"]
    assert parts.pop("tests/gpu")["status"] == "skipped"
    for name in ("verify: Megatron on all GPUs", "verify: Megatron, fp8",
                 "verify: Megatron, CUDA graphs"):  # fmt: skip
        assert parts.pop(name)["status"] == "left out"
    assert {name: part["status"] for name, part in parts.items()} == {
        "verify: Megatron": "passed",
        "verify: FSDP2 with torch.compile": "passed",
        "the paper's GPT": "passed",
    }
    for name in ("verify: Megatron", "verify: FSDP2 with torch.compile"):
        assert parts[name]["cost"]["measurement_seconds"] > 0
    assert parts["the paper's GPT"]["measurements"] == 4
    assert (tmp_path / "out" / "part-6" / "curves.png").stat().st_size > 10_000
    for name in document["parts"]:
        assert f"| {name} | " in done.stdout


def test_a_part_that_comes_to_its_limit_does_not_keep_the_others(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--out", tmp_path / "out",
         "--minutes", "0.05"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"]
    assert len(parts) == 7
    assert parts["the paper's GPT"]["status"] == "out of time"
