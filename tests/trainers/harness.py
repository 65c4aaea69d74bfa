"""Workers that train in the real frameworks, each framework in a folder of its own.

Their requirements contradict each other. ``TRAINER_FRAMEWORKS`` names a folder with one for each,
as ``launch/test.sh`` makes it from ``launch/frameworks/*.txt``; without it they are imported from
the environment.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, start_ranks

#: What each rank wrote, for ``processes`` of them; 0 is a script without a launcher.
Ranks = list[dict[str, Any]]

#: What a trainer that logs by plain names has added in a step measured.
LOGGED = {
    "critical_sharpness",
    "critical_learning_rate",
    "learning_rate_over_critical",
    "directional_sharpness",
    "edge_of_stability",
    "critical_sharpness_evaluations",
    "critical_sharpness_seconds",
}


def require(name: str, package: str) -> list[str]:
    """The paths to import ``package`` from; skips the module where it is in none.

    Args:
        name: of the framework: the extra that installs it, and its folder.
        package: that is imported, with dots where it is inside of another.
    """
    if folders := os.environ.get("TRAINER_FRAMEWORKS"):
        folder = Path(folders, name)
        if (folder / package.replace(".", "/")).is_dir():
            return [str(folder)]
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is inside of
        found = False
    if not found:
        pytest.skip(
            f'{package} is not installed: pip install ".[{name}]"',
            allow_module_level=True,
        )
    return []


def run(worker: str, folder: Path, processes: int, paths: list[str]) -> Ranks:
    """What each rank of ``tests.trainers.<worker>`` wrote; 0 ranks: one, without a launcher."""
    arguments = ["-m", f"tests.trainers.{worker}", str(folder)]
    environment = {"CUDA_VISIBLE_DEVICES": "", "TORCHELASTIC_RUN_ID": "test"}
    if processes:
        started = start_ranks(
            arguments, folder, processes, environment=environment, pythonpath=paths
        )
    else:
        search = os.pathsep.join([str(ROOT), *paths])
        with (folder / "output0.txt").open("wb") as output:
            started = [
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", *arguments],
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": search},
                    stdout=output, stderr=subprocess.STDOUT, cwd=folder,
                )
            ]  # fmt: skip
    try:
        codes = [process.wait(timeout=280) for process in started]
    finally:
        for process in started:
            process.kill()
    outputs = [path.read_text(errors="replace") for path in sorted(folder.glob("output*.txt"))]
    assert not any(codes), "\n".join(output[-4000:] for output in outputs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(len(started))]


def lines_of(logger: str) -> list[str]:
    """What is logged from now on, in a list that grows."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(logger).addHandler(handler)
    logging.getLogger(logger).setLevel(logging.INFO)
    return lines


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without how long they took."""
    return [{**record, "seconds": None} for record in records]


def check_records(result: dict[str, Any], due: list[int], *, slope: float = 1e-5) -> None:
    """The records of a rank are those that the worker computed ``anew``, from the definitions.

    Args:
        result: with ``records`` and ``anew``.
        due: iterations.
        slope: how exactly the slope is known.
    """
    assert [record["iteration"] for record in result["records"]] == due
    for record, anew in zip(result["records"], result["anew"], strict=True):
        assert record["status"] == "found"
        assert record["tokens"] == anew["tokens"]
        assert record["loss"] == pytest.approx(anew["loss"], rel=1e-6)
        assert record["slope"] == pytest.approx(anew["slope"], rel=slope)
        assert anew["lower"] <= anew["loss"] < anew["upper"]
        assert record["critical_lr_lower"] > 3 / 4 * record["critical_lr_upper"] * (1 - 1e-9)
        assert record["replay_error"] <= 2e-6 * record["loss"]  # the trainer gives its own loss


def check_found(records: list[dict[str, Any]], due: list[int]) -> None:
    """All due measurements were made, and found the critical learning rate."""
    assert [(record["iteration"], record["status"]) for record in records] == [
        (iteration, "found") for iteration in due
    ], [record["reason"] for record in records]


def check_resumed_without_state(runs: dict[str, Any], due: list[int]) -> None:
    """A run that goes on from a checkpoint without measurements measures from a cold start."""
    records = runs["resumed from without"]["records"]
    assert [(record["iteration"], record["status"]) for record in records] == [
        (iteration, "found") for iteration in due
    ]
    # Its first search starts elsewhere: a resumed run with the state would be told apart.
    assert untimed(records) != untimed(runs["saved"]["records"])[-len(due) :]


def worker_fixture(
    worker: str, name: str, processes: int, paths: list[str]
) -> Callable[..., Ranks]:
    """A fixture of the module that runs a worker once."""

    @pytest.fixture(scope="module", name=name)
    def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
        return run(worker, tmp_path_factory.mktemp(name), processes, paths)

    return ranks
