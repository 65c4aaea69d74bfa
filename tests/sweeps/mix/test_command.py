"""``megatron-sharpness mix`` from end to end, with both training scripts, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sharpness import cli
from megatron_sharpness.sweeps.mix import command as mix
from megatron_sharpness.sweeps.mix.recommendation import recommend
from tests.domains import write_domains
from tests.processes import ROOT

MODEL = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64
--max-position-embeddings 64 --micro-batch-size 4 --global-batch-size 8 --lr 1e-2 --vocab-size 257
--hidden-dropout 0 --attention-dropout 0 --log-interval 1"""
MEGATRON = """--tokenizer-type NullTokenizer --split 100,0,0 --eval-iters 0 --eval-interval 1000
--bf16 --use-distributed-optimizer"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("data"))


def command(script: str, data: Path) -> list[str]:
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    launch += ["--standalone", "--nproc-per-node", "2"]
    if script == "megatron":
        launch += ["-m", "megatron_sharpness.megatron", str(ROOT / "launch/pretrain_gpt.py")]
        launch += [*MEGATRON.split(), "--data-cache-path", str(data / "cache")]
    else:
        launch += [str(ROOT / "launch/fsdp/train.py")]
    return [*launch, *MODEL.split()]


def flags(out: Path, data: Path, shares: str = "0 1", **changed: str) -> list[str]:
    given = {
        "out": str(out), "vary": f"{data}/prose", "fixed": f"1 {data}/code", "shares": shares,
        "eval-data": f"prose={data}/prose code={data}/code", "eval-samples": "16",
        "accumulate": "4", "measure": "3", **changed,
    }  # fmt: skip
    return ["mix", *(w for name, v in given.items() for w in (f"--{name}", *v.split())), "--"]


def read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", ["megatron", "fsdp"])
def test_the_sweep_measures_every_share_and_recommends_one(
    script: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    training = command(script, data)
    assert cli.main([*flags(tmp_path, data, "0"), *training]) == 0, capsys.readouterr().err
    first = (tmp_path / "share-0.jsonl").stat().st_mtime_ns
    assert cli.main([*flags(tmp_path, data), *training]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"1 of 2 shares are in {tmp_path} already" in said
    assert (tmp_path / "share-0.jsonl").stat().st_mtime_ns == first
    assert "recommended:" in said and "one step there raises no loss up to" in said

    table = read_csv(tmp_path / "mix.csv")
    assert [(row["share"], row["task"]) for row in table] == [
        ("0.0", "prose"), ("0.0", "code"), ("1.0", "prose"), ("1.0", "code"),
    ]  # fmt: skip
    assert {row["batches"] for row in table} == {"3"}
    median = {(row["share"], row["task"]): float(row["median"]) for row in table}
    assert len(set(median.values())) == 4
    advice = json.loads((tmp_path / "recommendation.json").read_text())
    worst = {s: max(median[s, "prose"], median[s, "code"]) for s in ("0.0", "1.0")}
    assert str(advice["share"]) == min(worst, key=lambda share: worst[share])
    assert advice["lr"] == pytest.approx(2 / min(worst.values()))
    assert (tmp_path / "mix.png").stat().st_size > 10_000

    records = [json.loads(x) for x in (tmp_path / "share-1.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records if r["batch"] == "train"] == [5, 6, 7]
    # Nothing is trained: the fixed evaluation batch has the same loss every time.
    assert len({r["loss"] for r in records if r["batch"] == "prose"}) == 1

    other = [*flags(tmp_path, data, accumulate="5"), *training]
    assert cli.main(other) == 1
    assert "measured otherwise: --accumulate is 5 and was 4" in capsys.readouterr().err


def test_a_command_that_fails_is_reported_with_what_it_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "import sys; print('no such GPU'); sys.exit(3)"
    assert cli.main([*flags(tmp_path, data), sys.executable, "-c", script]) == 1
    said = capsys.readouterr().err
    assert "share 0: the training command ended with 3 and 0 of 3 batches measured" in said
    assert "no such GPU" in said and "shares that are done are not done again" in said


#: A training command that measures λ_c of 2 and 3 on both tasks and is interrupted where "stop" is.
STAND_IN = """
import json, os, pathlib, signal, sys, time
log = pathlib.Path(sys.argv[sys.argv.index("--critical-sharpness-log") + 1])
(log.parent / "pid").write_text(str(os.getpid()))
if (log.parent / "stop").exists() and log.name == "share-1.partial":
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
with log.open("w") as file:
    for iteration in (5, 6, 7):
        for i, batch in enumerate(("train", "prose", "code")):
            print(json.dumps(dict(iteration=iteration, batch=batch, status="found",
                                  critical_sharpness=1.0 + i)), file=file)
print("critical sharpness, frozen: parameters and buffers are what they were, sha256 " + "ab" * 32 +
      " | steps and measurements took 3.0 s | peak memory of a process: 100.0 MiB |")
"""


def test_a_mistyped_command_does_not_lock_the_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = [sys.executable, "-c", STAND_IN]
    assert cli.main([*flags(tmp_path, data), "no-such-torchrun", *training]) == 1
    said = capsys.readouterr().err
    assert "-- no-such-torchrun: it cannot be started (No such file or directory); give" in said
    assert cli.main([*flags(tmp_path, data), sys.executable, str(tmp_path / "trian.py")]) == 1
    assert cli.main([*flags(tmp_path, data), *training]) == 0
    assert cli.main([*flags(tmp_path, data), *training, "--lr", "1"]) == 1
    assert "the training command has --lr 1, which it did not have" in capsys.readouterr().err


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard, where the tests were begun in the background of a script, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_run_and_says_how_to_go_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stop").touch()
    argv = [*flags(tmp_path, data), sys.executable, "-c", STAND_IN]
    assert cli.main(argv) == 130
    assert capsys.readouterr().err == (
        "megatron-sharpness mix: stopped; 1 of 2 shares are done. To go on: "
        f"megatron-sharpness {shlex.join(argv)}\n"
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    (tmp_path / "stop").unlink()
    assert cli.main(argv) == 0
    assert "1 of 2 shares are in" in capsys.readouterr().out


def test_what_a_learning_rate_is_of_is_said_and_so_are_too_few_batches(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*flags(tmp_path, data), sys.executable, "-c", STAND_IN]) == 0
    said = capsys.readouterr().out
    assert "(from 3 batches, too few to say how sure that is: 20 are needed" in said
    assert "one step there raises no loss up to η = 0.667; code rises first" in said
    assert "%:" not in said and "draws" not in said
    assert "η is for one step along the update, with Adam's moments frozen at this point" in said
    many = {share: {"prose": [2.0] * 20, "code": [3.0] * 20} for share in (0.0, 1.0)}
    said = mix.format_advice(recommend(many), "prose")
    assert "(chosen in 100% of the bootstrap's draws)" in said
    assert "up to η = 0.667 (90 %: 0.667 to 0.667)" in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shares": "0.5 1.5"}, "--shares 1.5: a share of the data lies between 0 and 1"),
        ({"shares": "nan"}, "--shares nan"),
        ({"fixed": "1"}, "--fixed 1: it alternates; give WEIGHT PREFIX"),
        ({"fixed": "x y"}, "--fixed x y: it alternates"),
        ({"fixed": "0 code"}, "weights are positive"),
        ({"fixed": "1 /no/such"}, "--fixed /no/such: there is no /no/such.bin"),
        ({"vary": "/no/such"}, "--vary /no/such: there is no /no/such.bin"),
        ({"eval-data": "code=/no/such"}, "--eval-data code=/no/such: there is no /no/such.bin"),
        ({"measure": "0"}, "--measure 0"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    changed: dict[str, str], message: str, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    marker = tmp_path / "ran"
    training = [sys.executable, "-c", f"open({str(marker)!r}, 'w')"]
    assert cli.main([*flags(tmp_path / "out", data, **changed), *training]) == 1
    assert message in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_a_command_that_saves_or_has_data_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--save", "--data-path"):
        assert cli.main([*flags(tmp_path, data), "torchrun", "script.py", flag, "x"]) == 1
        assert f"{flag} in the training command" in capsys.readouterr().err


def test_a_share_is_a_data_path() -> None:
    fixed = [(3.0, "b"), (1.0, "c")]
    assert mix.mixture("a", 0.2, fixed) == ["0.2", "a", "0.6", "b", "0.2", "c"]
    assert mix.mixture("a", 0.0, fixed) == ["0.75", "b", "0.25", "c"]
    assert mix.mixture("a", 1.0, fixed) == ["a"]


def test_a_mix_is_read_from_a_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mix.args"
    config.write_text(f"# a mix\n--vary {data}/prose\n--fixed 1 {data}/code 2 /no/such\n")
    argv = ["mix", f"@{config}", "--eval-data", f"code={data}/code", "--out", str(tmp_path / "o")]
    assert cli.main([*argv, "--", "true"]) == 1
    assert "--fixed /no/such: there is no" in capsys.readouterr().err


def test_the_mix_of_the_configuration_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs/olmo2_midtraining.mix"
    assert cli.main(["mix", f"@{config}", "--out", "/nowhere", "--", "true"]) == 1
    assert "--vary data/dclm: there is no data/dclm.bin" in capsys.readouterr().err


def test_batches_count_where_all_tasks_have_a_value(tmp_path: Path) -> None:
    def line(iteration: int, batch: str, status: str, value: float | None = None) -> str:
        return json.dumps(
            {"iteration": iteration, "batch": batch, "status": status, "critical_sharpness": value}
        )

    lines = [
        line(1, "train", "found", 9.0), line(1, "a", "found", 2.0), line(1, "b", "not_descent"),
        line(2, "train", "found", 9.0), line(2, "a", "failed"), line(2, "b", "found", 3.0),
        line(3, "train", "found", 9.0), line(3, "a", "no_upper"), line(3, "b", "found", 4.0),
    ]  # fmt: skip
    (tmp_path / "share-0.5.jsonl").write_text("\n".join(lines))
    values, endings = mix.read(tmp_path, [0.5])
    assert values == {0.5: {"a": [2.0, 0.0], "b": [float("inf"), 4.0]}}
    assert endings[0.5] == {"found": 3, "not_descent": 1, "failed": 1, "no_upper": 1}
