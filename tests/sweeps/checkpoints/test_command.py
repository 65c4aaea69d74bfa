"""``megatron-sharpness checkpoints``: what it runs, skips, resumes, estimates and writes.

The training command is a stand-in here, which knows one number for each checkpoint; the real ones
are in ``test_training.py``.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sharpness import cli
from tests.processes import ROOT

SAID = (
    f"critical sharpness, frozen: parameters and buffers are what they were, sha256 {'ab' * 32} | "
    "steps and measurements took 3.0 s | peak memory of a process: 100.0 MiB |"
)

#: λ_c is the iteration, or 7; every third batch rises at once. A folder with a file "broken" fails,
#: and where there is a file "ending" all measurements end so.
TRAINING = f"""
import json, pathlib, sys
def given(flag, default=None):
    return sys.argv[-sys.argv[::-1].index(flag)] if flag in sys.argv else default  # the last one
step = int(given("--ckpt-step", "7"))
folder = pathlib.Path(given("--load") or given("--hf-model"))
if (folder / "broken").exists() or (folder / f"iter_{{step:07d}}" / "broken").exists():
    sys.exit("cannot read it")
ending = folder / f"iter_{{step:07d}}" / "ending"
last = min(int(given("--exit-interval", 1000)), int(given("--train-iters")))
first = int(given("--critical-sharpness-frozen"))
with open(given("--critical-sharpness-log"), "w") as file:
    for i in range(first + 1, last + 1):
        rises = (i - first) % 3 == 0
        record = dict(
            iteration=i, batch="train", lr=1 / step, seconds=0.5, evaluations=4,
            edge_of_stability=2 * step, edge_of_stability_preconditioned=38 * step,
            status="not_descent" if rises else "found",
            critical_sharpness=None if rises else step + (i - first) % 3,
        )
        if ending.exists():
            record.update(status=ending.read_text(), critical_sharpness=None, lr=0.0,
                          edge_of_stability=None, edge_of_stability_preconditioned=None)
            record["reason"] = "out of memory" if record["status"] == "failed" else None
        print(json.dumps(record), file=file)
        if "--critical-sharpness-eval-data" in sys.argv:
            print(json.dumps({{**record, "batch": "code", "evaluations": 2}}), file=file)
with open(pathlib.Path(given("--critical-sharpness-log")).parent / "calls", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
print({SAID!r})
"""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Checkpoints of three iterations."""
    folder = tmp_path / "run"
    for iteration in (20, 40, 60):
        path = folder / f"iter_{iteration:07d}"
        path.mkdir(parents=True)
        (path / ".metadata").touch()
        (path / "metadata.json").touch()
    (folder / "latest_checkpointed_iteration.txt").write_text("60")
    return folder


def measure(out: Path, *flags: str, train_iters: int = 50) -> int:
    command = [sys.executable, "-c", TRAINING, "--train-iters", str(train_iters)]
    return cli.main(["checkpoints", "--out", str(out), "--measure", "6", *flags, "--", *command])


def calls(out: Path) -> list[list[str]]:
    return [json.loads(line) for line in (out / "calls").read_text().splitlines()]


def table(out: Path) -> list[dict[str, Any]]:
    with (out / "checkpoints.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_series_of_a_run_with_its_own_moments(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert measure(out, "--load", str(run_folder)) == 0
    said = capsys.readouterr().out
    assert "checkpoints: 3, done: 0" in said
    # One step took 3 s, of which 0.5 s the measurement; 6 of each are to come.
    assert "checkpoints: 3, each with 0 steps for the moments and 6 that are measured" in said
    assert "about 30 forward passes" in said
    assert "a step 2.5 s, a measurement 0.5 s: about 18 s a checkpoint, 54 s in all" in said
    assert "100 MiB at the peak of a process" in said
    assert "iter_0000040: λ_c = 41.5 ± 0.5 over 4 batches; nothing has changed, sha256" in said
    rows = table(out)
    assert [(row["checkpoint"], row["iteration"]) for row in rows] == [
        (f"iter_00000{n}", str(n)) for n in (20, 40, 60)
    ]
    for n, row in zip((20, 40, 60), rows, strict=True):
        assert float(row["mean"]) == n + 1.5 and float(row["median"]) == n + 2
        assert row["batches"] == "6" and row["rises_at_once"] == "2"
        assert float(row["lr"]) == pytest.approx(1 / n)
        assert float(row["edge_of_stability"]) == 2 * n
        assert float(row["edge_of_stability_preconditioned"]) == 38 * n
        assert float(row["first"]) == n + 1
        assert row["sha256"] == "ab" * 32 and row["endings"] == "found:4 not_descent:2"
    assert (out / "checkpoints.png").stat().st_size > 10_000

    probe, *runs = calls(out)
    for given in (probe, *runs):
        assert "--use-checkpoint-opt_param-scheduler" in given and "--finetune" not in given
        assert "--exit-on-missing-checkpoint" in given
    frozen = [given[given.index("--critical-sharpness-frozen") + 1] for given in runs]
    assert frozen == ["20", "40", "60"]
    # The training's own length, where the steps lie within it: Megatron's data depend on it.
    assert runs[0].count("--train-iters") == runs[1].count("--train-iters") == 1
    assert runs[0][runs[0].index("--exit-interval") + 1] == "26"
    assert runs[2][-1:] != ["50"] and runs[2].count("--train-iters") == 2
    assert "66" in runs[2]


def test_what_is_done_is_not_done_again(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    load = ["--load", str(run_folder)]
    assert measure(out, *load, "--iterations", "40", "20") == 0
    before = (out / "iter_0000020.jsonl").stat().st_mtime_ns
    assert [row["iteration"] for row in table(out)] == ["20", "40"]
    assert measure(out, *load) == 0
    assert "checkpoints: 3, done: 2" in capsys.readouterr().out
    assert (out / "iter_0000020.jsonl").stat().st_mtime_ns == before
    assert [row["iteration"] for row in table(out)] == ["20", "40", "60"]
    count = len(calls(out))
    assert measure(out, *load) == 0
    assert len(calls(out)) == count
    assert measure(out, *load, "--moments", "warm:5") == 1
    assert "otherwise: --moments is warm:5 and was checkpoint" in capsys.readouterr().err
    other = tmp_path / "other"
    run_folder.rename(other)
    assert measure(out, "--load", str(other)) == 1
    assert "it holds a iter_0000020 that was read by --load" in capsys.readouterr().err


def test_broken_checkpoints_are_reported_and_skipped_and_the_exit_status_says_so(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (run_folder / "iter_0000020" / ".metadata").unlink()
    (run_folder / "iter_0000060" / "broken").touch()
    assert measure(out, "--load", str(run_folder)) == 3
    said = capsys.readouterr().out
    assert "iter_0000020: skipped: half-written" in said
    assert "iter_0000060: skipped: the training command ended with 1 and 0 of 6" in said
    assert "cannot read it" in said
    assert "2 of 3 were skipped: iter_0000020, iter_0000060" in said
    assert [row["iteration"] for row in table(out)] == ["40"]
    assert measure(out, "--load", str(run_folder)) == 3  # and nothing but these is left to do
    # Mended, they are done too.
    (run_folder / "iter_0000020" / ".metadata").touch()
    (run_folder / "iter_0000060" / "broken").unlink()
    assert measure(out, "--load", str(run_folder)) == 0
    assert [row["iteration"] for row in table(out)] == ["20", "40", "60"]


def test_where_none_can_be_read_that_is_an_error(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in run_folder.glob("iter_*"):
        (path / "broken").touch()
    for flags in ([], ["--estimate"]):
        assert measure(tmp_path / "out", "--load", str(run_folder), *flags) == 1
        assert "none of the checkpoints could be measured" in capsys.readouterr().err


def test_checkpoints_without_a_number_say_why_and_count_as_skipped(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for iteration, ending in ((20, "not_descent"), (40, "failed"), (60, "zero_lr")):
        (run_folder / f"iter_{iteration:07d}" / "ending").write_text(ending)
    for already in (False, True):
        assert measure(out, "--load", str(run_folder)) == 3
        said = capsys.readouterr().out
        assert "nan" not in said
        if not already:
            assert "iter_0000020: λ_c = ∞ over 6 batches; nothing has changed" in said
            assert "iter_0000060: no λ_c, but zero_lr:6; nothing has changed" in said
        assert "iter_0000040: no λ_c of train, but failed:6 (out of memory)\n" in said
        assert (
            "iter_0000060: no λ_c of train, but zero_lr:6, at the checkpoint's own learning rate; "
            "give --moments warm:100 and another --out\n"
        ) in said
        assert "iter_0000060" + "zero_lr:6".rjust(24) in said


def test_a_legend_has_what_is_drawn(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    legends = []
    monkeypatch.setattr(
        Axes, "legend", lambda axes, **_: legends.append(axes.get_legend_handles_labels()[1])
    )
    for iteration in (20, 40, 60):
        (run_folder / f"iter_{iteration:07d}" / "ending").write_text("zero_lr")
    assert measure(tmp_path / "none", "--load", str(run_folder)) == 3
    assert legends == []
    (run_folder / "iter_0000020" / "ending").unlink()
    assert measure(tmp_path / "one", "--load", str(run_folder)) == 3
    (run_folder / "iter_0000020" / "ending").write_text("not_descent")
    (run_folder / "iter_0000040" / "ending").unlink()
    assert measure(tmp_path / "other", "--load", str(run_folder)) == 3
    assert [len(labels) for labels in legends] == [4, 4]


def test_a_timed_command_does_not_lock_the_folder_and_a_missing_one_is_no_traceback(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, load = tmp_path / "out", ["--load", str(run_folder)]
    missing = ["checkpoints", "--out", str(out), *load, "--", "no-such-torchrun", "train.py"]
    assert cli.main(missing) == 1
    assert "-- no-such-torchrun: it cannot be started" in capsys.readouterr().err
    assert measure(out, *load, "--measure", "8", "--estimate") == 0
    assert measure(out, *load) == 0
    assert measure(out, *load, "--measure", "8") == 1


def test_ctrl_c_says_what_is_done(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, load = tmp_path / "out", ["--load", str(run_folder)]
    assert measure(out, *load, "--iterations", "20") == 0
    capsys.readouterr()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", stop)
    assert measure(out, *load) == 130
    said = capsys.readouterr().err
    assert said.startswith(
        "megatron-sharpness checkpoints: stopped; 1 of 3 checkpoints are done. To go on: "
        f"megatron-sharpness checkpoints --out {out} --measure 6 --load "
    )


def test_estimate_prints_the_cost_and_ends(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--load", str(run_folder), "--moments", "warm:100", "--estimate"]
    flags += ["--eval-data", f"code={tmp_path}/code.jsonl", "--eval-samples", "4"]
    (tmp_path / "code.jsonl").touch()
    assert measure(out, *flags) == 0
    said = capsys.readouterr().out
    assert "100 steps for the moments and 6 that are measured, about 48 forward passes" in said
    # Half a second for the step's own batch and half for the other data; two steps in 2 s.
    assert "a step 1 s, a measurement 1 s" in said
    assert len(calls(out)) == 1 and not (out / "checkpoints.csv").exists()
    assert not list(out.glob("iter_*"))


def test_hugging_face_folders_have_their_moments_accumulated_and_other_data_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folders = tmp_path / "out", []
    for name in ("step10-tokens2B", "step30-tokens6B"):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "config.json").touch()
        (folders[-1] / "model.safetensors").touch()
    (tmp_path / "code.jsonl").touch()
    flags = ["--hf-model", *map(str, folders), "--moments", "warm:3"]
    flags += ["--eval-data", f"code={tmp_path}/code.jsonl"]
    assert measure(out, *flags) == 0
    rows = table(out)
    assert [(r["checkpoint"], r["batch"], r["tokens"], r["lr"]) for r in rows] == [
        ("step10-tokens2B", "train", "2000000000.0", ""),
        ("step10-tokens2B", "code", "2000000000.0", ""),
        ("step30-tokens6B", "train", "6000000000.0", ""),
        ("step30-tokens6B", "code", "6000000000.0", ""),
    ]
    given = calls(out)[1]
    assert "--finetune" in given and given[given.index("--train-iters", 3) + 1] == "9"
    assert given[given.index("--hf-model") + 1] == str(folders[0])
    assert "step10-tokens2B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hf-model", "a", "--moments", "checkpoint"], "hold no optimizer; give warm:100"),
        (["--hf-model", "a", "--moments", "warm"], "--moments warm: give 'checkpoint', or 'warm"),
        (["--hf-model", "a", "--moments", "warm:-1"], "--moments warm:-1"),
        (["--hf-model", "a", "--measure", "0"], "--measure 0: a number"),
        (["--hf-model", "a", "--iterations", "3"], "--iterations: they are of --load"),
        (["--load", "RUN", "--revisions", "main"], "--revisions: they are of --hf-model"),
        (["--load", "RUN", "--iterations", "30"], "--iterations 30"),
        (["--load", "/no/such"], "--load /no/such: there is no such folder"),
        (["--load", "RUN", "--eval-data", "x"], "--eval-data x: give NAME=PREFIX"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    flags: list[str], message: str, run_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [flag.replace("RUN", str(run_folder)) for flag in flags]
    assert measure(tmp_path / "out", *given) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--load", "--hf-model", "--save", "--finetune"])
def test_flags_that_the_series_gives_are_refused(
    flag: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["checkpoints", "--out", str(tmp_path / "out"), "--load", str(run_folder)]
    assert cli.main([*argv, "--", "torchrun", "script.py", flag]) == 1
    assert f"{flag} in the training command" in capsys.readouterr().err


def test_the_series_of_the_configuration_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = ROOT / "configs" / "olmo2_7b.checkpoints"
    assert cli.main(["checkpoints", f"@{config}", "--out", str(tmp_path / "o"), "--", "true"]) == 1
    said = capsys.readouterr().err
    assert "--revisions stage1-step1000-*" in said
    assert "the branches of allenai/OLMo-2-1124-7B cannot be listed" in said
