"""Which tests wait for ``launch/test.sh --rare``, and in which order the others are begun."""

from __future__ import annotations

import random
import time
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.processes import ROOT

#: Slow tests of what rarely changes: other versions and trainers, whole sweeps, experiments made
#: anew, four processes where two are tried too, rare situations in Megatron, and the CPU backend's
#: own. By file, or by file and test; tests may mark themselves, too.
RARE = (
    "tests/benchmarks/test_endurance.py::test_a_short_run*",
    "tests/benchmarks/test_memory.py",
    "tests/experiments/test_phenomena.py::test_full_batch*",
    "tests/experiments/test_phenomena.py::test_adam*",
    "tests/experiments/test_phenomena.py::test_critical_sharpness_of_a_gpt*",
    "tests/launch/test_gpu_check.py",
    "tests/launch/test_fsdp_data.py::test_a_hugging_face_dataset*",  # another framework's
    "tests/launch/test_slurm.py",
    "tests/megatron/test_adaptive_mix.py",
    "tests/megatron/test_bridge.py",
    "tests/megatron/test_bridge_finetune.py",
    "tests/megatron/test_checkout.py",
    "tests/megatron/test_configs.py",
    "tests/megatron/test_cpu.py",
    "tests/megatron/test_recipes.py::test_recipes_are_measured*",
    "tests/megatron/test_situations.py",
    "tests/megatron/test_versions.py",
    "tests/pytorch/test_layouts.py::test_on_several_processes*4-*",
    "tests/pytorch/test_pipelines.py::test_pipelines_with_data_parallelism*",
    "tests/sweeps/checkpoints/test_training.py",
    "tests/sweeps/mix/test_command.py::test_the_sweep*",
    "tests/trainers/*",
)

#: Files that take longest, longest first: begun last, they would be waited for alone.
LONG = (
    "tests/sweeps/checkpoints/test_training.py",
    "tests/pytorch/test_layouts.py",
    "tests/pytorch/test_pipelines.py",
    "tests/verify/test_trainings.py",
    "tests/megatron/test_bitwise.py",
    "tests/megatron/test_versions.py",
    "tests/benchmarks/test_memory.py",
    "tests/benchmarks/test_endurance.py",
    "tests/megatron/test_bridge.py",
    "tests/megatron/test_bridge_finetune.py",
    "tests/experiments/test_phenomena.py",
    "tests/megatron/test_situations.py",
    "tests/megatron/test_number.py",
    "tests/megatron/test_adaptive_mix.py",
    "tests/megatron/test_faults.py",
    "tests/sweeps/mix/test_command.py",
    "tests/launch/test_slurm.py",
    "tests/trainers/test_torchtitan.py",
    "tests/trainers/test_deepspeed.py",
    "tests/trainers/test_trl.py",
    "tests/trainers/test_nemo_automodel.py",
    "tests/trainers/test_optimizer_matrix.py",
    "tests/launch/test_fsdp.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-recipes",
        action="store_true",
        help="with MEGATRON_LM: all recipes of the checkout, not a sample of them",
    )
    parser.addoption(
        "--begin-until",
        type=float,
        metavar="TIME",
        help="seconds since the epoch: what would begin later is skipped, and named; files are "
        "begun in another order each day, so that each has its turn",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without the rare tests a file of nothing else is not even imported."""
    if config.getoption("markexpr") != "not rare" or collection_path.suffix != ".py":
        return None
    file = collection_path.relative_to(ROOT).as_posix()
    return any(fnmatchcase(file, each) for each in RARE) or None


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if any(fnmatchcase(f"{_file(item)}::{item.name}", f"{each}*") for each in RARE):
            item.add_marker(pytest.mark.rare)
    files = list(dict.fromkeys(_file(item) for item in items))
    files.sort(key=lambda file: LONG.index(file) if file in LONG else len(LONG))
    if config.getoption("begin_until") is not None:
        random.Random(date.today().toordinal()).shuffle(files)
    turns = {file: turn for turn, file in enumerate(files)}
    items.sort(key=lambda item: turns[_file(item)])


@pytest.hookimpl(tryfirst=True)  # before its fixtures are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    last = item.config.getoption("begin_until")
    if last is not None and time.time() > last:
        pytest.skip(f"{_file(item)}: no time was left to begin it")


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT).as_posix()
