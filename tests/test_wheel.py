"""The wheel builds and installs, holds the package and nothing else, and asks for little."""

from __future__ import annotations

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.processes import ROOT


def pip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("pip", "setuptools"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    source = tmp_path_factory.mktemp("source")  # a build leaves files beside the sources
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "megatron_sharpness", source / "megatron_sharpness")
    shutil.copytree(ROOT / "launch", source / "launch")
    built = tmp_path_factory.mktemp("built")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source)
    (path,) = built.glob("*.whl")
    return path


def test_it_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("megatron_sharpness/**/*.py")}
    assert sources | {"megatron_sharpness/py.typed"} == {
        name for name in names if ".dist-info/" not in name
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_asks_for_torch_and_numpy_alone(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    required = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert required == ["torch>=2.6", "numpy"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_it_installs_and_its_command_runs(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    where = "import megatron_sharpness; print(megatron_sharpness.__file__)"
    for command in ([sys.executable, "-c", where], [tmp_path / "bin" / "megatron-sharpness", "-h"]):
        result = subprocess.run(
            command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
        )
        assert str(tmp_path) in result.stdout or "tokenize" in result.stdout
