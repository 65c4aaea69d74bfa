"""``megatron-sharpness verify``: what it starts, what it refuses, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sharpness import cli
from megatron_sharpness.arguments import as_trial
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.trial import Trial
from tests.processes import ROOT

#: A training that takes no notice of what is asked of it, and starts a process of its own.
DEAF = "import os, sys, time; os.fork(); print('deaf', flush=True); time.sleep(float(sys.argv[1]))"


def verify(out: Path, *command: str, options: Sequence[str] = ()) -> int:
    return cli.main(["verify", "--out", str(out), *options, "--", *command])


def processes_of(marker: str) -> list[int]:
    """Processes with this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in path.read_text() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it is over
    return found


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (["no-such-program"], [], "-- no-such-program: it cannot be started"),
        ([sys.executable, "-c", "raise SystemExit('no data')"], [],
         "the training command without measurement ended with 1 after 0 iterations"),
        ([sys.executable, "-c", DEAF, "0"], [], "hand its environment to all processes"),
        ([sys.executable, "-c", DEAF, "30"], ["--timeout", "0.5"],
         "made no iteration for 0.5 s after 0 (--timeout)"),
        (["true"], ["--every", "20"], "--iterations 12: with --every 20 nothing would be measured"),
        (["true"], ["--every", "0"], "--every 0: an interval"),
        (["true"], ["--timeout", "nan"], "--timeout nan: seconds; give a positive number"),
    ],
)  # fmt: skip
def test_what_cannot_run_ends_with_2_and_says_why(
    command: list[str], options: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert verify(tmp_path / "out", *command, options=options) == 2
    said = capsys.readouterr().err
    assert said.startswith("megatron-sharpness verify: error: ") or "iterations in" in said
    assert message in said
    if "no data" in command[-1]:
        assert "no data" in said  # the end of the log
    assert processes_of(DEAF) == []


def test_what_was_said_before_does_not_stand_beside_a_failure(tmp_path: Path) -> None:
    (tmp_path / "verify.md").write_text("# Critical sharpness verified: all promises hold")
    assert verify(tmp_path, "false") == 2
    assert not (tmp_path / "verify.md").exists()


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert verify(tmp_path / "file" / "out", "true") == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_leaves_nothing_behind(number: int, tmp_path: Path) -> None:
    out, marker = tmp_path / "out", f"marked-{os.getpid()}-{number}"
    existed = number == signal.SIGTERM
    if existed:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    started = subprocess.Popen(
        [sys.executable, "-m", "megatron_sharpness.cli", "verify", "--out", str(out), "--",
         sys.executable, "-c", DEAF, "300", marker],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    until = time.monotonic() + 60
    while len(processes_of(marker)) < 3 and time.monotonic() < until:  # and the fork
        time.sleep(0.05)
    assert len(processes_of(marker)) == 3
    started.send_signal(number)
    _, said = started.communicate(timeout=60)
    assert started.returncode == cli.STOPPED and said.endswith("stopped\n")
    assert processes_of(marker) == []
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "notes.txt"] if existed else [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"critical_sharpness_frozen": 0}, "--critical-sharpness-frozen: it trains nothing"),
        ({"adaptive_mix": True}, "--adaptive-mix: with it training follows the measurements"),
    ],
)
def test_what_differs_on_purpose_is_refused(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    args = SimpleNamespace(tensorboard_dir=None, **given)
    with pytest.raises(InputError, match=message):
        as_trial(args, Trial(tmp_path, 3, 12))
