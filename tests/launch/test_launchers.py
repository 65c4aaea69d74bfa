"""What the launchers of torchrun and SLURM start."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_fsdp import EVERY, parse
from tests.processes import ROOT


def launch(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    defaults = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments],
        env=os.environ | defaults | variables,
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def dry(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command that would be started, in ``stdout``."""
    return launch(script, *arguments, DRY_RUN="1", **variables)


@pytest.mark.parametrize("script", ["torchrun_gpt.sh", "torchrun_fsdp.sh"])
def test_ranks_of_one_node_meet_at_any_port_and_of_several_at_the_one_given(script: str) -> None:
    one, chosen, several = (
        shlex.split(dry(script, **variables).stdout)
        for variables in ({}, {"MASTER_PORT": "29501"}, {"NODES": "2", "MASTER_ADDR": "node0"})
    )
    assert "--standalone" in one and "--master-port" not in one
    for command, port in ((chosen, "29501"), (several, "29500")):
        assert "--standalone" not in command
        assert command[command.index("--master-port") + 1] == port


def test_torchrun_starts_the_configuration_on_several_nodes() -> None:
    result = dry(
        "torchrun_gpt.sh", "--lr", "1e-3", NODES="4", NODE_RANK="3", MASTER_ADDR="node0"
    )
    command = shlex.split(result.stdout)
    for part in ("--nnodes 4", "--node-rank 3", "--master-addr node0", "--num-layers 12"):
        flag, value = part.split()
        assert command[command.index(flag) + 1] == value
    assert not any(word.startswith("#") for word in command)
    assert command[-4:] == ["--measure-critical-sharpness-every", "100", "--lr", "1e-3"]


def test_torchrun_trains_on_the_cpu_where_it_is_told_to() -> None:
    for backend, variables in (("cuda", {}), ("cpu", {"BACKEND": "cpu"})):
        command = shlex.split(dry("torchrun_gpt.sh", **variables).stdout)
        assert command[command.index("--backend") + 1] == backend


@pytest.mark.parametrize(
    ("flag", "connections"),
    [("--bf16", "1"), ("--use-megatron-fsdp", "unset"), ("--use-torch-fsdp2", "unset")],
)
def test_cuda_has_one_connection_but_for_fsdp_which_refuses_it(
    flag: str, connections: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ${CUDA_DEVICE_MAX_CONNECTIONS-unset}\n")
    python.chmod(0o755)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert launch("torchrun_gpt.sh", flag, PYTHON=str(python)).stdout.strip() == connections


def test_slurm_takes_its_nodes_from_the_job() -> None:
    result = dry(
        "slurm_gpt.sbatch", SLURM_NNODES="8", SLURM_JOB_ID="123", SLURM_SUBMIT_DIR=str(ROOT)
    )
    command = shlex.split(result.stdout)
    assert command[command.index("--nnodes") + 1] == "8"
    assert command[command.index("--master-port") + 1] == "20123"
    assert command[command.index("--tensor-model-parallel-size") + 1] == "2"
    assert "--exit-signal-handler" in command


def test_an_unknown_configuration_is_refused_by_name() -> None:
    result = dry("torchrun_gpt.sh", CONFIG="configs/none.args")
    assert result.returncode == 1
    assert "CONFIG=configs/none.args: no such file" in result.stderr
    assert "configs/llama_7b.args" in result.stderr


#: Without llama_70b: this script's own GPT has no grouped-query attention, and refuses it by name.
CONFIGS = [path for path in sorted(ROOT.glob("configs/*.args")) if path.stem != "llama_70b"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_slurm_starts_the_configurations_on_its_nodes(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = dry(
        "slurm_fsdp.sbatch", "--lr", "1e-3", CONFIG=str(config), OUT=str(tmp_path),
        SLURM_NNODES="8", SLURM_JOB_ID="123", SLURM_SUBMIT_DIR=str(ROOT),
    )  # fmt: skip
    command = shlex.split(result.stdout)
    assert command[command.index("--nnodes") + 1] == "8"
    assert command[command.index("--master-port") + 1] == "20123"
    flags = command[command.index("launch/fsdp/train.py") + 1 :]
    assert flags[-4:] == [EVERY, "100", "--lr", "1e-3"]
    args = parse(monkeypatch, shlex.join(flags))
    assert (args.lr, args.bf16, args.gpt.swiglu or False) == (1e-3, True, "llama" in config.stem)


def test_torchrun_needs_no_configuration_but_a_right_one() -> None:
    result = dry(
        "torchrun_fsdp.sh", "--hf-model", "folder", CONFIG="", DATA="--text 'a b'",
        NODES="4", NODE_RANK="3", MASTER_ADDR="node0", EVERY="7",
    )  # fmt: skip
    command = shlex.split(result.stdout)
    assert command[command.index("launch/fsdp/train.py") + 1 :] == [
        "--text", "a b", "--save", "runs/fsdp_model/checkpoints",
        "--load", "runs/fsdp_model/checkpoints", "--tensorboard-dir", "runs/fsdp_model/tensorboard",
        EVERY, "7", "--hf-model", "folder",
    ]  # fmt: skip
    assert command[command.index("--node-rank") + 1] == "3"
    refused = launch("torchrun_fsdp.sh", CONFIG="configs/none.args")
    assert refused.returncode == 1
    assert "CONFIG=configs/none.args: no such file" in refused.stderr


def test_torchrun_says_once_what_is_refused(tmp_path: Path) -> None:
    # By whichever rank is the first to see it: the one that says it is a slow one.
    late = 'import os, time\nif os.environ.get("LOCAL_RANK") == "0":\n    time.sleep(3)\n'
    (tmp_path / "sitecustomize.py").write_text(late)
    result = launch(
        "torchrun_fsdp.sh", CONFIG="", GPUS_PER_NODE="2", CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
    )  # fmt: skip
    assert result.returncode != 0
    message = "launch/fsdp/train.py: error: the following arguments are required: --seq-length"
    assert result.stderr.count(message) == 1
    assert "Traceback" not in result.stderr.split("ChildFailedError")[0].split(message)[0]
