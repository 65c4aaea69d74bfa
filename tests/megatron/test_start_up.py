"""Bad input is refused before training, by flag, value, reason and remedy; off is off."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sharpness.arguments import add_arguments
from tests.megatron.harness import MODEL, ROOT, run

#: Parses command lines with Megatron's own parser and validation, and prints what came of each.
CASES = """
import contextlib, io, json, sys
from megatron_sharpness.megatron import cpu
cpu.install()
from megatron_sharpness.megatron import install
install()
from megatron.training import training
from megatron.training.arguments import parse_args, validate_args

results = []
for case in json.loads(sys.stdin.read()):
    real = training.train_step
    sys.argv = ["pretrain_gpt.py", *cpu.add_required_flags(case.split())]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            validate_args(parse_args())
        outcome = "accepted"
    except SystemExit:
        outcome = said.getvalue()
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    hooked = training.train_step is not real
    training.train_step = real
    results.append([outcome, hooked, "megatron_sharpness.megatron.hook" in sys.modules])
print("RESULTS " + json.dumps(results))
"""


def outcomes(cases: list[str]) -> list[tuple[str, bool, bool]]:
    done = subprocess.run(
        [sys.executable, "-c", CASES],
        input=json.dumps([f"{MODEL} {case}".replace("\n", " ") for case in cases]),
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return [tuple(result) for result in json.loads(lines[0].removeprefix("RESULTS "))]


EVERY = "--measure-critical-sharpness-every"
REFUSED = {
    f"{EVERY} -5": [f"{EVERY} -5", "positive", "give 100"],
    f"{EVERY} 2.5": [EVERY, "invalid int value", "2.5"],
    f"{EVERY} 10 --critical-sharpness-tolerance 1.0": [
        "--critical-sharpness-tolerance 1.0", "between 0 and 1", "0.25",
    ],
    f"{EVERY} 10 --critical-sharpness-tolerance 0": ["--critical-sharpness-tolerance 0.0"],
    f"{EVERY} 10 --critical-sharpness-tolerance nan": ["--critical-sharpness-tolerance nan"],
    f"{EVERY} 10 --critical-sharpness-initial-guess -1": ["--critical-sharpness-initial-guess -1"],
    f"{EVERY} 10 --critical-sharpness-max-evaluations 0": [
        "--critical-sharpness-max-evaluations 0", "leave it out",
    ],
    f"{EVERY} 10 --critical-sharpness-alarm -1": ["--critical-sharpness-alarm -1.0", "give 1"],
    f"{EVERY} 10 --critical-sharpness-alarm 1 --critical-sharpness-alarm-after 0": [
        "--critical-sharpness-alarm-after 0", "1 or more",
    ],
    f"{EVERY} 10 --critical-sharpness-alarm 1 --critical-sharpness-alarm-every 20": [
        "--critical-sharpness-alarm-every 20", "no longer than", "10",
    ],
    f"{EVERY} 10 --critical-sharpness-alarm-every 5": [
        "--critical-sharpness-alarm-every 5", "there is no alarm",
    ],
    f"{EVERY} 10 --critical-sharpness-parts layer": [
        "--critical-sharpness-parts layer", "modules, groups, layers",
    ],
    f"{EVERY} 10 --critical-sharpness-parts modules a=b": [
        "--critical-sharpness-parts modules", "one preset alone",
    ],
    f"{EVERY} 10 --critical-sharpness-parts a=b a=c": ["--critical-sharpness-parts a=c", "its own"],
    f"{EVERY} 10 --critical-sharpness-parts a=(": ["--critical-sharpness-parts a=(", "expression"],
    f"{EVERY} 10 --critical-sharpness-parts modules --critical-sharpness-parts-every 25": [
        "--critical-sharpness-parts-every 25", "multiple of the 10", "give 100",
    ],
    f"{EVERY} 10 --critical-sharpness-parts-every 20": ["--critical-sharpness-parts-every 20"],
    "--measure-adam-snr": ["--measure-adam-snr True", "off", "interval"],
    f"{EVERY} 10 --measure-adam-snr --optimizer sgd": ["--measure-adam-snr True", "sgd", "adam"],
    f"{EVERY} 10 --measure-adam-snr --optimizer lion": ["--measure-adam-snr True", "lion", "adam"],
    f"{EVERY} 10 --measure-adam-snr --optimizer soap": ["--measure-adam-snr True", "soap", "adam"],
    f"{EVERY} 10 --critical-sharpness-method newton": ["newton", "certified"],
    f"{EVERY} 10 --critical-sharpness-method point": ["point", "certified"],
    f"{EVERY} 10 --critical-sharpness-microbatches 1": ["--critical-sharpness-microbatches 1"],
    f"{EVERY} 10 --critical-sharpness-eval-data code=/no/such": [
        "--critical-sharpness-eval-data code=/no/such", "there is no /no/such.bin", "give",
    ],
    f"{EVERY} 10 --critical-sharpness-eval-data code": [
        "--critical-sharpness-eval-data code", "give NAME=PREFIX",
    ],
    f"{EVERY} 10 --critical-sharpness-eval-data train=/no/such.jsonl": ["'train' is the step's"],
    f"{EVERY} 10 --critical-sharpness-eval-samples 7": [
        "--critical-sharpness-eval-samples 7", "2 at a time", "give a multiple",
    ],
    f"{EVERY} 10 --critical-sharpness-frozen -1": ["--critical-sharpness-frozen -1", "0 or more"],
    "--critical-sharpness-frozen 2 --save /tmp/none --save-interval 2": [
        "--critical-sharpness-frozen 2", "leave out --save",
    ],
    f"{EVERY} 10 --critical-sharpness-log /proc/none/log.jsonl": [
        "--critical-sharpness-log /proc/none/log.jsonl", "cannot be written", "name a file",
    ],
    f"{EVERY} 10 --perform-rl-step": ["--perform-rl-step True", "Leave one of the two out"],
}  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> dict[str, tuple[str, bool, bool]]:
    cases = ["", f"{EVERY} 0", *REFUSED, f"{EVERY} 10"]
    return dict(zip(cases, outcomes(cases), strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(
    case: str, seen: dict[str, tuple[str, bool, bool]]
) -> None:
    outcome, hooked, _ = seen[case]
    assert outcome != "accepted"
    assert not hooked
    for part in REFUSED[case]:
        assert part in outcome, outcome


def test_off_hooks_and_imports_nothing(seen: dict[str, tuple[str, bool, bool]]) -> None:
    assert seen[""] == ("accepted", False, False)
    assert seen[f"{EVERY} 0"] == ("accepted", False, False)
    assert seen[f"{EVERY} 10"] == ("accepted", True, True)


def test_help_has_the_group() -> None:
    parser = add_arguments(argparse.ArgumentParser())
    text = parser.format_help()
    assert "critical sharpness:" in text
    for flag in ("every", "method", "tolerance", "initial-guess", "max-evaluations", "mode",
                 "offload", "log", "on-error"):  # fmt: skip
        assert f"critical-sharpness-{flag}" in text


def test_the_flags_alone_import_neither_torch_nor_a_hook_nor_the_cpu() -> None:
    names = ["torch", *(f"megatron_sharpness.megatron.{name}" for name in ("hook", "cpu"))]
    done = subprocess.run(
        [sys.executable, "-c", "import sys, megatron_sharpness.megatron\n"
                               f"print([name for name in {names} if name in sys.modules])"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_sharpness.megatron", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip


def test_a_script_that_is_not_there_is_named() -> None:
    done = command("no_such_script.py", "--lr", "1")
    assert done.returncode == 2
    assert "no_such_script.py" in done.stderr and "no such file" in done.stderr


def test_the_backend_is_chosen_and_said(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "print(torch.ones(2, device='cuda').device, sys.argv[0].endswith('script.py'))\n"
        "print(sys.argv[1:3], '--transformer-impl' in sys.argv)\n"
    )
    done = command("--backend", "cpu", str(script), "--lr", "1")
    assert done.returncode == 0, done.stderr
    assert "runs on the CPU over gloo" in done.stdout
    assert "cpu True\n['--lr', '1'] True" in done.stdout
    assert "--backend" in command("--help").stdout


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"question": "x" * 40, "answer": "y"}, "line 1 has 42 tokens, and --seq-length 32"),
        ({"question": "x", "answer": "\x00\xff"}, ""),
        ({"text": "x"}, "line 1 is no JSON object"),
    ],
)
def test_other_data_that_cannot_be_used_is_refused_before_the_first_step(
    line: dict[str, str], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text((json.dumps(line) + "\n") * 8)
    flags = f"--critical-sharpness-eval-data other={path}"
    result = run(tmp_path / "run", flags, every=2)
    if not reason:
        result.expect_success()
        return
    assert result.returncode != 0 and not result.training_lines
    assert f"--critical-sharpness-eval-data other={path}: {reason}" in result.output
