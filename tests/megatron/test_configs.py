"""The files of ``configs/``: Megatron's own parser and checks accept what the launcher starts."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

CONFIGS = sorted(ROOT.glob("configs/*.args"))
VERSIONS = {"installed": None, "other": os.environ.get("MEGATRON_CORE_OTHER")}

# Tensor, pipeline and data parallel size, sequence parallelism; the data parallel size brings the
# ranks to 8, or to as many as the other two take.
LAYOUTS = {
    "gpt_12layer_768": (1, 1, 8, False),
    "llama_7b": (2, 2, 2, True),
    "llama_70b": (8, 4, 1, True),
}

# As rank 0; without a GPU the CPU backend stands in for what the checks ask of CUDA.
CHECK = """
import sys
from megatron_sharpness.megatron import cpu
cpu.install()
from megatron_sharpness.megatron import install
install()
from megatron.training import arguments

args = arguments.parse_args()
arguments.validate_args(args)
print("layout:", args.tensor_model_parallel_size, args.pipeline_model_parallel_size,
      args.data_parallel_size, args.sequence_parallel, args.params_dtype)
"""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_megatron_accepts_the_configuration(config: Path, version: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    other = VERSIONS[version]
    if version == "other" and other is None:
        pytest.skip("MEGATRON_CORE_OTHER does not name a second megatron-core installation")
    variables = {"CONFIG": str(config), "OUT": str(tmp_path), "DRY_RUN": "1"}
    launcher = subprocess.run(
        [ROOT / "launch/torchrun_gpt.sh"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    command = shlex.split(launcher.stdout)
    flags = command[command.index("launch/pretrain_gpt.py") + 1 :]
    tensor, pipeline, data, sequence = LAYOUTS[config.stem]
    environment = os.environ | {
        "WORLD_SIZE": str(tensor * pipeline * data),
        "RANK": "0",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [other, str(ROOT)])),
    }
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK, *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    layout = f"layout: {tensor} {pipeline} {data} {sequence} torch.bfloat16"
    assert layout in result.stdout
