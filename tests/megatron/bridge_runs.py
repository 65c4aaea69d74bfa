"""Runs of :mod:`tests.megatron.bridge_worker`, which begins them in one process after the other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.harness import ROOT, Run
from tests.trainers.harness import require

PATHS = [*require("bridge", "megatron.bridge"), *require("hf", "transformers")]


def run_all(root: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Run]:
    """All cases by name, one after the other in forks of one process that has Bridge imported."""
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
        output, _ = worker.communicate(timeout=870)  # three minutes on two cores of its own
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


def check_scan(result: Run, names: list[tuple[int, str]]) -> None:
    """η_c stands between losses that were computed anew (``Scan`` of the worker), of these steps
    and data."""
    scans = json.loads((result.folder / "scan.json").read_text())
    assert [(scan["record"]["iteration"], scan["name"]) for scan in scans] == names
    for scan in scans:
        record, (start, lower, upper) = scan["record"], scan["losses"]
        assert record["loss"] == pytest.approx(start, rel=1e-6)
        assert lower <= start < upper
        if scan["name"] != "train" and record["status"] == "not_descent":
            continue  # it rises at once
        assert record["status"] == "found"
        assert record["critical_lr_lower"] > 3 / 4 * record["critical_lr_upper"] * (1 - 1e-9)
