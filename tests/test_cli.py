"""The command line itself: what it says of its version and of its commands."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from megatron_sharpness import cli
from tests.processes import ROOT

sys.path.insert(0, str(ROOT / "launch"))

from fsdp.arguments import parse_arguments
from megatron_sharpness.megatron.__main__ import main as start_megatron

HELPS = {
    "megatron-sharpness": lambda: cli.main(["--help"]),
    **{name: lambda name=name: cli.main([name, "--help"]) for name in cli.COMMANDS},
    "python -m megatron_sharpness.megatron": lambda: start_megatron(["--help"]),
    "train.py": lambda: parse_arguments(["--help"]),
}


@pytest.mark.parametrize("name", HELPS)
def test_helps_are_plain_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        HELPS[name]()
    said = capsys.readouterr().out
    assert said.startswith("usage: ")
    assert "show this help message" in said
    assert not re.search(r"``|:[a-z]+:`|::\s", said), said


def test_the_version_is_the_one_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "installed_version", lambda package: f"1.2 of {package}")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == "megatron-sharpness 1.2 of megatron-sharpness\n"


def test_a_source_tree_says_that_it_has_no_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(cli, "installed_version", missing)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert "a source tree that is not installed" in capsys.readouterr().out
