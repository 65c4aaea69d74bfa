"""What a sweep's folder goes on with, and what it says of a command that differs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.sweeps.settings import keep_settings

TRAINING = "torchrun --nproc-per-node 8 train.py --lr 1e-3 --seed 3"


def keep(out: Path, training: str) -> None:
    keep_settings(out, {"measure": 3, "training": shlex.split(training)})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder in which a run has come to its end."""
    keep(tmp_path, TRAINING)
    (tmp_path / "share-0.log").touch()
    (tmp_path / "share-0.jsonl").touch()
    return tmp_path


def test_settings_are_those_given_last_until_something_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    keep(out, "torchrunn train.py")
    (out / "share-0.log").touch()
    (out / "share-0.partial").touch()
    (out / "own.jsonl").touch()  # a folder may hold other things
    keep(out, TRAINING)
    assert json.loads((out / "settings.json").read_text())["training"] == TRAINING.split()


def test_a_folder_goes_on_with_the_same_settings_alone(out: Path) -> None:
    keep(out, TRAINING)
    with pytest.raises(InputError, match=r"--measure is 4 and was 3\. Give the same, or"):
        keep_settings(out, {"measure": 4, "training": TRAINING.split()})
    with pytest.raises(InputError, match="--eval-data is a=b c=d and was not given"):
        keep_settings(out, {"measure": 3, "eval_data": ["a=b", "c=d"]})
    (out / "file").touch()
    with pytest.raises(InputError, match=r"--out .*give another folder"):
        keep_settings(out / "file" / "out", {})


@pytest.mark.parametrize(
    "training",
    [
        "torchrun --master-port 29501 --nproc-per-node 8 train.py --lr 1e-3 --seed 3",
        "torchrun --standalone --nproc-per-node 8 train.py --lr 1e-3 --seed 3",
        "torchrun --nproc-per-node 8 --rdzv_endpoint=node7:1 --rdzv-id 4 --rdzv-backend c10d "
        "--max_restarts 0 --log-dir logs -r 3 -t 3 train.py --lr 1e-3 --seed 3",
        "env MASTER_PORT=1 MASTER_ADDR=node7 " + TRAINING,
        "srun --jobid 5 -w node7 --output=5.log " + TRAINING,
    ],
)
def test_where_processes_meet_and_log_may_change(training: str, tmp_path: Path) -> None:
    keep(tmp_path, f"srun {TRAINING}" if training.startswith("srun") else TRAINING)
    (tmp_path / "share-0.log").touch()
    (tmp_path / "share-0.jsonl").touch()
    keep(tmp_path, training)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (TRAINING.replace("1e-3", "3e-4"), "has --lr 3e-4 where it had --lr 1e-3"),
        (TRAINING + " --bf16", "has --bf16, which it did not have"),
        (TRAINING.replace(" --seed 3", ""), "has no --seed 3, which it had"),
        (
            TRAINING.replace("8", "4").replace("3 ", "4 "),
            "has --nproc-per-node 4 where it had --nproc-per-node 8, and has --lr 1e-4 where it "
            "had --lr 1e-3",
        ),
        (
            "env OMP_NUM_THREADS=1 " + TRAINING,
            "has OMP_NUM_THREADS=1 torchrun where it had torchrun",
        ),
        # The script's own words are compared, whatever they are called.
        (TRAINING + " --log-dir x", "has --log-dir x, which it did not have"),
        (TRAINING + " -w 0.1", "has -w 0.1, which it did not have"),
    ],
)
def test_what_differs_in_the_training_command_is_shown_and_nothing_else(
    training: str, message: str, out: Path
) -> None:
    with pytest.raises(InputError, match="the training command ") as refused:
        keep(out, training)
    said = str(refused.value)
    assert message in said
    assert "train.py" not in said


@pytest.mark.parametrize("script", ["-m my.train", "-m torch.distributed.run -m x.y", "run.sh"])
def test_the_scripts_words_begin_after_a_module_and_after_a_shell_script(
    script: str, tmp_path: Path
) -> None:
    (tmp_path / "share-0.log").touch()
    (tmp_path / "share-0.jsonl").touch()
    keep(tmp_path, f"python {script} -w 0.1")
    with pytest.raises(InputError, match=r"-w 0\.2 where it had -w 0\.1"):
        keep(tmp_path, f"python {script} -w 0.2")
