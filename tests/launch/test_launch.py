"""The scripts of ``launch/``: setting up, and what the launchers start."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT

SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci/run"])

# Stands in for a Python: answers what environment.sh asks, makes venvs of itself, notes the rest.
FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
    "-c "*) exit "${FAKE_UNSUITABLE:-0}" ;;
    "-V "*) echo "Python ${FAKE_VERSION:-3.12.9}" ;;
    "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo "venv $*" >>"$FAKE_LOG" ;;
    *) echo "$*" >>"$FAKE_LOG"; exit "${FAKE_PIP_STATUS:-0}" ;;
esac
"""
FAKE_UV = """#!/bin/bash
echo "uv $*" >>"$FAKE_LOG"
mkdir -p "${@: -1}/bin" && cp "$FAKE_PYTHON" "${@: -1}/bin/python"
"""
TOOLS = ["bash", "cat", "chmod", "cp", "dirname", "flock", "mkdir", "rm", "sha256sum"]


class Checkout:
    """A checkout with ``launch/environment.sh`` and a machine with nothing but what a test adds."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log, self.bin = folder / "checkout", folder / "log", folder / "bin"
        (self.root / "launch").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("launch/environment.sh", "launch/requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
        self.fake_python = self.program("fake", FAKE_PYTHON)

    def program(self, name: str, content: str) -> Path:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
        return path

    def set_up(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run ``environment.sh``; what it had done is in ``did``."""
        self.log.write_text("")
        environment = {
            "PATH": str(self.bin),
            "HOME": str(self.bin),
            "FAKE_LOG": str(self.log),
            "FAKE_PYTHON": str(self.fake_python),
        }
        return subprocess.run(
            [self.root / "launch/environment.sh"],
            env=environment | variables,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
        )

    @property
    def did(self) -> list[str]:
        return [
            line.split()[0] if line[0] != "-" else "pip"
            for line in self.log.read_text().splitlines()
        ]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def test_setting_up_again_does_only_what_changed(checkout: Checkout) -> None:
    python = {"PYTHON": str(checkout.fake_python)}
    assert checkout.set_up(**python).returncode == 0
    assert checkout.did == ["venv", "pip", "pip"]
    assert checkout.set_up(**python).returncode == 0
    assert checkout.did == []
    assert checkout.set_up().returncode == 0  # .venv's own Python will do
    assert checkout.did == []

    with (checkout.root / "launch/requirements.txt").open("a") as pins:
        pins.write("another==1.0\n")
    assert checkout.set_up().returncode == 0
    assert checkout.did == ["pip", "pip"]

    assert checkout.set_up(**python, FAKE_VERSION="3.13.1").returncode == 0
    assert checkout.did == ["venv", "pip", "pip"]


def test_an_installation_that_failed_is_done_again(checkout: Checkout) -> None:
    python = {"PYTHON": str(checkout.fake_python)}
    failed = checkout.set_up(**python, FAKE_PIP_STATUS="1")
    assert failed.returncode == 1
    assert "Check network and disk space, then run this again" in failed.stderr
    assert checkout.set_up(**python).returncode == 0
    assert checkout.did[-2:] == ["pip", "pip"]


def test_python_is_found_on_the_path_and_among_pyenvs(checkout: Checkout) -> None:
    pyenv = checkout.program(".pyenv/versions/3.12.4/bin/python3", FAKE_PYTHON)
    assert f"({pyenv})" in checkout.set_up().stderr
    shutil.rmtree(checkout.root / ".venv")
    checkout.program("python3.13", FAKE_PYTHON)
    assert "(python3.13)" in checkout.set_up().stderr


def test_uv_fetches_a_python_where_there_is_none(checkout: Checkout) -> None:
    checkout.program("uv", FAKE_UV)
    assert checkout.set_up().returncode == 0
    assert checkout.did == ["uv", "pip", "pip"]
    assert checkout.set_up().returncode == 0
    assert checkout.did == []


def test_without_any_python_it_says_what_to_do(checkout: Checkout) -> None:
    result = checkout.set_up()
    assert result.returncode == 1
    assert "found no Python 3.12 or 3.13" in result.stderr
    assert "pyenv install 3.12" in result.stderr


@pytest.mark.parametrize("python", ["/no/such/python", "fake"])
def test_a_bad_python_is_refused_by_name(checkout: Checkout, python: str) -> None:
    result = checkout.set_up(PYTHON=python, FAKE_UNSUITABLE="1")
    assert result.returncode == 1
    assert f"PYTHON={python} is not a Python 3.12 or 3.13" in result.stderr
    assert not (checkout.root / ".venv").exists()
