"""``megatron-sharpness report``: reading, tables and figures."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sharpness import cli
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.measurement import MISSED, STATUSES
from megatron_sharpness.report.events import QUANTITIES, read_tensorboard, read_tensorboard_beside
from megatron_sharpness.report.records import (
    Run,
    column,
    read_batches,
    read_records,
    read_training_log,
)
from megatron_sharpness.report.table import format_table
from tests.processes import ROOT

DRAW = "megatron_sharpness.report.figure.draw"


def record(iteration: int, status: str = "found", **fields: Any) -> dict[str, Any]:
    lr = 1e-3
    found = {
        "critical_lr": 2e-3,
        "critical_lr_lower": 1.95e-3,
        "critical_lr_upper": 2.05e-3,
        "critical_sharpness": 1e3,
        "directional_sharpness": 0.9e3,
        "lr_over_critical": 0.5,
    }
    return {
        "iteration": iteration,
        "lr": lr,
        "loss": 2.5,
        "edge_of_stability": 2 / lr - 0.1,
        "edge_of_stability_preconditioned": 19 * (2 / lr - 0.1),
        "evaluations": 4,
        "seconds": 0.5,
        "batch": "train",
        "status": status,
        **{name: value if status not in MISSED else None for name, value in found.items()},
        **fields,
    }


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """As a run writes them, step by step."""
    records = sorted(records, key=lambda each: each["iteration"])
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def test_a_run_that_goes_back_replaces_what_it_had_measured_from_there_on(tmp_path: Path) -> None:
    first = [record(i, batch=batch) for i in (10, 20, 30, 40) for batch in ("train", "code")]
    resumed = [record(20, loss=1.0), record(20, batch="code", loss=1.0), record(30, loss=1.0)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (*first, *resumed)))
    batches = read_batches(path)
    assert [each["iteration"] for each in batches["train"]] == [10, 20, 30]
    assert [each["loss"] for each in batches["train"]] == [2.5, 1.0, 1.0]
    assert [(each["iteration"], each["loss"]) for each in batches["code"]] == [(10, 2.5), (20, 1.0)]
    assert read_records(path) == batches["train"]


def test_other_data_is_read_beside_and_drawn_capped_where_it_rises_at_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from matplotlib.figure import Figure

    from megatron_sharpness.report.figure import _draw_others

    written = [record(step) for step in (10, 20, 30)]
    written += [record(10, batch="code", critical_sharpness=700.0), record(30, batch="code")]
    written += [record(20, status="not_descent", batch="code", critical_sharpness=None)]
    batches = read_batches(write(tmp_path / "log.jsonl", written))
    assert [len(batches[name]) for name in ("train", "code")] == [3, 3]
    others = {"code": batches["code"]}
    axes = Figure().subplots()
    axes.set_yscale("log")
    _draw_others(axes, Run("run", batches["train"], others=others))
    (triangle,) = (line for line in axes.get_lines() if line.get_marker() == "^")
    assert triangle.get_xydata().tolist() == [[20.0, 2000.0]]  # twice the largest of all


def test_parts_are_read_apart_and_the_first_to_break_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [
        record(step, part=part, critical_lr=1e-3 / ratio, lr_over_critical=ratio)
        for step in (10, 20, 30)
        for part, ratio in (("norms", 0.01), ("attention", 0.4), ("mlp", 0.1))
    ]
    never = [record(step, "no_upper", part="output") for step in (10, 20, 30)]
    at_once = [record(step, "not_descent", part="router") for step in (10, 20, 30)]
    hidden = [record(step, "noise_limited", part="rest") for step in (10, 20, 30)]
    whole = [record(step, part=None) for step in (10, 20, 30)]
    path = write(tmp_path / "log.jsonl", [*alone, *never, *hidden, *whole])
    assert [each["iteration"] for each in read_records(path)] == [10, 20, 30]
    figure = tmp_path / "parts.png"
    cli.main(["report", str(path), "--out", str(figure)])
    told = capsys.readouterr().out
    order = [told.index(f"\n  {name} ") for name in ("attention", "mlp", "norms", "output", "rest")]
    assert order == sorted(order)
    assert "η/η_c 0.4, breaks at 2.5 times the learning rate" in told
    assert "never raises the loss" in told and "no measurement tells" in told
    assert "attention breaks first" in told and "by the factors mlp 4, norms 40" in told
    assert struct.unpack(">II", figure.read_bytes()[16:24]) == (1600, 1840)

    cli.main(["report", str(write(tmp_path / "other.jsonl", [*alone, *at_once, *whole]))])
    told = capsys.readouterr().out
    assert told.index("\n  router ") < told.index("\n  attention ")
    assert "raises the loss from the start" in told and "breaks first" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"iteration": 10, "status": "found"}\n{"iteration": }', "line 2: .*no JSON"),
        ("no record\n", "line 1: not a measurement .no JSON"),
        ('{"iteration": 10, "sta', "holds no measurement"),
        ('{"iteration": 10, "status": "fine"}\n', "line 1: not a measurement .*status 'fine'"),
        ("[1]\n", "line 1: not a measurement .JSON, but no object"),
        ('{"lr": 1}\n', "line 1: not a measurement .status None"),
        ('{"iteration": 1, "status": "found", "lr": "abc"}', "line 1: .*lr 'abc'"),
        ("\n", "holds no measurement; .*--measure-critical-sharpness-every, or every= in Python"),
    ],
)
def test_lines_that_are_no_records_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_records(path)


def test_lines_that_are_cut_short_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "log.jsonl", [record(10), record(20), record(30)])
    first, second, third = path.read_text().splitlines()
    path.write_text(f"{first}\n{second[:100]}\n{third}\n{first[:7]}")
    assert [each["iteration"] for each in read_records(path)] == [10, 30]
    assert cli.main(["report", str(path)]) == 0
    told = capsys.readouterr().out
    assert "line 2 of" in told and "line 4 of" in told and "line 3" not in told


def test_a_missing_log_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "none.jsonl")]) == 1
    error = capsys.readouterr().err
    assert re.search(r"RUN \S+none.jsonl: no such file or folder; .*JsonLinesSink.* sinks=", error)


def test_null_and_missing_fields_become_nan() -> None:
    values = column([{"lr": 1}, {"lr": None}, {}], "lr")
    np.testing.assert_array_equal(values, [1.0, np.nan, np.nan])


def test_table_is_aligned_and_shows_what_was_not_found() -> None:
    lines = format_table([record(10), record(1000, "no_upper", loss=None)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[0] == "iteration"
    assert lines[1].split()[-1] == "found"
    assert lines[2].split()[:2] == ["1000", "-"]
    assert lines[2].split()[-1] == "no_upper"


def test_the_last_measurements_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path / "log.jsonl", [record(i) for i in range(10, 60, 10)])
    assert cli.main(["report", str(log), "--last", "2"]) == 0
    _, *rows, status, verdict, _ = capsys.readouterr().out.split("\n", 5)
    assert [row.split()[0] for row in rows] == ["40", "50"]
    assert status == "5 measurements (5 found); now: below the edge"
    assert verdict == "verdict: learning rate at the upper end of the usual range"


TRAINING_LINE = (
    " [2026-01-01 00:00:00.0] iteration {:8d}/     100 | consumed samples:           16 | "
    "elapsed time per iteration (ms): 221.2 | learning rate: 1.000000E-03 | "
    "global batch size:    16 | lm loss: 3.5E+00 | loss scale: 1.0 | grad norm: 1.027 |\n"
)


def test_training_log_gives_loss_and_learning_rate(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("noise\n" + TRAINING_LINE.format(2) + TRAINING_LINE.format(1))
    curves = read_training_log(log).curves
    for name, values in (("loss", [3.5, 3.5]), ("lr", [1e-3, 1e-3])):
        np.testing.assert_array_equal(curves[name].iteration, [1, 2])
        np.testing.assert_array_equal(curves[name].values, values)
    log.write_text("noise\n")
    with pytest.raises(InputError, match="no line of it reports an iteration"):
        read_training_log(log)


def write_events(folder: Path, **scalars: list[int]) -> None:
    """Event files with each tag at these steps, as many as the step."""
    pytest.importorskip("tensorboard")
    writer: Any = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(folder)
    for tag, steps in scalars.items():
        for step in steps:
            writer.add_scalar(tag, float(step), step)
    writer.close()


def test_tensorboard_gives_loss_and_learning_rate(tmp_path: Path) -> None:
    write_events(tmp_path, **{"lm loss": [1, 2], "train/loss": [5], "learning-rate": [2, 4]})
    logged = read_tensorboard(tmp_path)
    assert logged.notes == []
    for name, steps in (("loss", [1, 2]), ("lr", [2, 4])):
        np.testing.assert_array_equal(logged.curves[name].iteration, steps)
        np.testing.assert_array_equal(logged.curves[name].values, steps)


def test_event_files_with_nothing_but_our_curves_need_no_word(tmp_path: Path) -> None:
    tags = ("critical-sharpness", "critical-sharpness vs samples", "critical-learning-rate/code",
            "adam-snr/loss_head.weight/fan_in", "adam-snr/lr.weight/both")  # fmt: skip
    write_events(tmp_path, **{tag: [1] for tag in tags})
    assert read_tensorboard_beside(tmp_path / "critical_sharpness.jsonl").notes == []


@pytest.mark.parametrize(
    ("field", "chosen", "passed_over"),
    [
        ("loss", ["lm loss", "train/loss"], ["lm loss validation", "loss-scale"]),
        ("loss", ["train/loss", "loss", "train/ce_loss"], ["val/loss", "eval_loss", "Loss/test"]),
        ("loss", ["Loss/train"], ["Loss/validation", "Loss/train vs samples"]),
        ("loss", ["trainLoss"], ["valLoss"]),
        ("loss", ["train_loss_step", "train_loss_epoch"], ["val_loss_epoch", "latest", "lossy"]),
        ("loss", ["training/loss"], ["train/aux_loss", "load_balancing_loss"]),
        ("loss", ["train/CE loss"], ["train/Z loss", "train/PPL", "eval/c4/CE loss"]),
        ("loss", ["loss_metrics/global_avg_loss"], ["loss_metrics/global_max_loss"]),
        ("loss", ["train/loss", "train/train_loss"], ["eval/loss"]),
        ("lr", ["learning-rate", "lr"], ["learning-rate vs samples", "critical-learning-rate"]),
        ("lr", ["lr-AdamW/pg1", "lr-AdamW/pg2"], ["lr-AdamW-momentum"]),
        ("lr", ["train/learning_rate"], ["train/critical_lr", "train/lr_over_critical"]),
        ("lr", ["optim/LR (group 0)"], ["optim/critical learning rate", "rate"]),
        ("lr", [], ["learning-rate-over-critical", "critical-learning-rate/code", "train/loss"]),
    ],
)
def test_tags_of_training_are_told_from_others(
    field: str, chosen: list[str], passed_over: list[str]
) -> None:
    (quantity,) = (each for each in QUANTITIES if each.field == field)
    assert quantity.choose([*passed_over, *reversed(chosen)]) == chosen


def test_what_other_trainers_log_is_drawn_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Run] = []
    monkeypatch.setattr(DRAW, lambda runs, *_, **__: drawn.extend(runs))
    write(tmp_path / "critical_sharpness.jsonl", [record(10), record(20)])
    arguments = ["report", str(tmp_path), "--out", str(tmp_path / "curves.png")]
    write_events(tmp_path, **{"loss": [3], "train/loss": [1, 2], "val/loss": [7]})
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "\nloss of every logged iteration: the tag train/loss, not loss\n" in said
    assert "learning rate: at the measurements only, no tag" in said
    assert "(there are loss, train/loss, val/loss)" in said
    np.testing.assert_array_equal(drawn[-1].curve("loss").values, [1, 2])
    np.testing.assert_array_equal(drawn[-1].curve("lr").iteration, [10, 20])
    write_events(tmp_path, **{"lr-AdamW": [2, 4]})
    assert cli.main([*arguments, "--tensorboard-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "\nlearning rate of every logged iteration: the tag lr-AdamW\n" in said
    np.testing.assert_array_equal(drawn[-1].curve("lr").values, [2, 4])


@pytest.mark.parametrize("out", [[], ["--out", "page.html"]])
@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--tensorboard-dir", "none", "there is no such folder; give the folder"),
        ("--tensorboard-dir", "run.jsonl", "it is a file; give the folder"),
        ("--tensorboard-dir", ".", "it holds no event file .*give one of its folders.* a/runs"),
        ("--tensorboard-dir", "a/empty", "it holds no event file .*; give one that does"),
        (
            "--tensorboard-dir",
            "a/runs",
            r"no tag .*\(there are a, b0, .*, b6, 3 more\); log them as train/loss and train/lr",
        ),
        ("--train-log", "none", r"cannot be read \(No such file or directory\)"),
        ("--train-log", "run.jsonl", "no line of it .*; give their output, or .*--tensorboard-dir"),
    ],
)
def test_what_holds_no_curves_is_refused_drawn_or_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: list[str],
    flag: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/empty").mkdir(parents=True)
    write_events(tmp_path / "a/runs", a=[1], **{f"b{i}": [1] for i in range(10)})
    write(tmp_path / "run.jsonl", [record(10)])
    assert cli.main(["report", "run.jsonl", flag, value, *out]) == 1
    assert re.search(f"error: {flag} {value}: {message}", capsys.readouterr().err)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "records",
    [
        [record(10 * i) for i in range(1, 200)],
        [record(10)],
        [record(10, "failed"), record(20, "zero_lr", lr=0.0, loss=None)],
        [record(i, status) for i, status in enumerate(STATUSES, start=1)],
    ],
    ids=["long", "single", "nothing found", "every status"],
)
def test_figure_is_a_png_of_the_promised_size(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    pytest.importorskip("matplotlib")
    log, out = write(tmp_path / "log.jsonl", records), tmp_path / "curves.png"
    assert cli.main(["report", str(log), "--out", str(out)]) == 0
    header = out.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:24]) == (1600, 1400)


def test_several_runs_are_one_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    logs = [
        write(tmp_path / f"{number} $\\bad$.jsonl", [record(i) for i in range(10, 60, 10)])
        for number in range(9)
    ]
    logs.append(write(tmp_path / "missed.jsonl", [record(10, "failed")]))
    out = tmp_path / "curves.png"
    assert cli.main(["report", *map(str, logs), "--out", str(out)]) == 0
    assert struct.unpack(">II", out.read_bytes()[16:24]) == (1600, 2200)


def test_an_overlay_has_a_colour_and_a_name_for_each_run() -> None:
    figure_module: Any = pytest.importorskip("matplotlib.figure")
    from megatron_sharpness.report.figure import _draw_overlay

    figure = figure_module.Figure()
    first = [record(i, critical_sharpness=500.0) for i in (10, 20)]
    second = [record(i, critical_sharpness=700.0) for i in (10, 20)]
    runs = [Run("one", first), Run("two", [*second, record(30, "failed")])]
    _draw_overlay(figure, runs, preconditioned=True)
    names, kinds = ([text.get_text() for text in legend.get_texts()] for legend in figure.legends)
    assert names == ["one", "two"]
    assert len(kinds) == 3
    colors = [line.get_color() for line in figure.legends[0].get_lines()]
    assert len(set(colors)) == 2
    panels = {axes.get_title(): axes for axes in figure.axes}
    drawn = {line.get_color(): set(line.get_ydata()) for line in panels["Loss"].get_lines()}
    assert drawn == {color: {2.5} for color in colors}
    sharpness = panels["Critical sharpness"]
    levels = {(line.get_color(), line.get_ydata()[0]) for line in sharpness.get_lines()}
    assert {(colors[0], 500.0), (colors[1], 700.0)} <= levels
    assert [text.get_text() for text in sharpness.get_legend().get_texts()] == ["failed (1)"]


def test_a_measurement_between_two_without_a_number_is_drawn() -> None:
    figure_module: Any = pytest.importorskip("matplotlib.figure")
    from megatron_sharpness.report.figure import _curve

    axes = figure_module.Figure().subplots()
    values = np.array([1.0, np.nan, 3.0, np.nan, 5.0, 6.0])
    _curve(axes, np.arange(6.0), values, "λ", color="black")
    points = [line for line in axes.get_lines() if line.get_linestyle() == "None"]
    assert [list(line.get_xdata()) for line in points] == [[0, 2]]


def test_every_missed_measurement_is_marked() -> None:
    figure_module: Any = pytest.importorskip("matplotlib.figure")
    from megatron_sharpness.report.figure import _mark_missed

    axes = figure_module.Figure().subplots()
    records = [record(i, status) for i, status in enumerate(STATUSES, start=1)]
    _mark_missed(axes, [*records, record(99, "failed")])
    marked = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert marked["failed (2)"] == [len(STATUSES), 99]
    assert len(marked) == len(MISSED)


def test_a_figure_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    log = write(tmp_path / "log.jsonl", [record(10)])
    for out in (tmp_path / "none" / "curves.png", tmp_path / "curves.unknown"):
        assert cli.main(["report", str(log), "--out", str(out)]) == 1
        assert f"--out {out}: cannot be written" in capsys.readouterr().err


def test_a_folder_is_read_with_its_event_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "warm-up 40" / "tensorboard"
    folder.mkdir(parents=True)
    write(folder / "critical_sharpness.jsonl", [record(10), record(20)])
    writer: Any = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(folder)
    writer.add_scalar("critical-sharpness", 1e3, 10)
    writer.flush()
    drawn: list[Run] = []
    monkeypatch.setattr(DRAW, lambda runs, *_, **__: drawn.extend(runs))
    out = ["--out", str(tmp_path / "curves.png")]

    assert cli.main(["report", str(folder), *out]) == 0
    assert drawn[-1].logged.curves == {}  # no loss in the event files
    for iteration in (9, 10, 11):
        writer.add_scalar("lm loss", 3.5, iteration)
        writer.add_scalar("learning-rate", 0.25, iteration)
    writer.close()
    for given in (folder, folder.parent):
        assert cli.main(["report", str(given), *out]) == 0
        assert drawn[-1].name == "warm-up 40"
        np.testing.assert_array_equal(drawn[-1].curve("loss").iteration, [9, 10, 11])
    assert cli.main(["report", str(folder / "critical_sharpness.jsonl"), *out]) == 0
    np.testing.assert_array_equal(drawn[-1].curve("loss").iteration, [10, 20])


def test_a_training_log_still_goes_with_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Run] = []
    monkeypatch.setattr(DRAW, lambda runs, *_, **__: drawn.extend(runs))
    training = tmp_path / "train.log"
    training.write_text(TRAINING_LINE.format(7))
    log = write(tmp_path / "run.jsonl", [record(10)])
    out = ["--out", str(tmp_path / "curves.png")]
    assert cli.main(["report", str(log), "--train-log", str(training), *out]) == 0
    np.testing.assert_array_equal(drawn[0].curve("loss").iteration, [7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl", "--out", "a.pdf"], "--out a.pdf: cannot be written, .* .png .* or .html"),
        (["a.jsonl", "b.jsonl", "--train-log", "t.log"], "--train-log t.log: belongs to one run"),
        (["a.jsonl", "b.jsonl", "--tensorboard-dir", "tb"], "--tensorboard-dir tb: belongs to one"),
        (["empty"], "RUN empty: no critical_sharpness.jsonl .*JsonLinesSink.* sinks="),
        (["a.jsonl", "b.jsonl", "a.jsonl"], "RUN a.jsonl: given 2 times"),
        (["a.jsonl", "--last", "0"], "--last 0: must be at least 1"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, [record(10)])
    assert cli.main(["report", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "a.pdf").exists()


def test_runs_are_named_apart_and_their_statuses_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        folder.mkdir(parents=True)
        write(folder / "critical_sharpness.jsonl", [record(10, "failed"), record(20, "zero_lr")])
    third = write(tmp_path / "third.jsonl", [record(10), record(20, "failed"), record(30)])
    assert cli.main(["report", *map(str, folders), str(third), "--last", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {*map(str, folders), str(third)} <= set(lines)
    assert any(
        line.startswith("2 measurements (0 found, 1 failed, 1 zero_lr); now: too few")
        for line in lines
    )
    assert any(line.startswith("3 measurements (2 found, 1 failed); now:") for line in lines)
    assert cli.main(["report", str(folders[0]), str(third)]) == 0
    told = capsys.readouterr().out
    assert {"run", "third"} <= {line.split(" ")[0] for line in told.splitlines()}
    assert "measurements (" not in told  # of several runs none is listed unless asked for


@pytest.mark.parametrize(
    ("suffix", "module"), [("png", "matplotlib.figure"), ("html", "plotly.io")]
)
def test_a_missing_library_is_named_with_its_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    module: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    log, library = write(tmp_path / "log.jsonl", [record(10)]), module.split(".")[0]
    assert cli.main(["report", str(log)]) == 0  # the table needs neither
    assert cli.main(["report", str(log), "--out", str(tmp_path / f"out.{suffix}")]) == 1
    error = capsys.readouterr().err
    assert f"out.{suffix}: a .{suffix} needs {library}" in error
    assert f"pip install {library}" in error


def test_the_table_imports_no_plotting_library(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [record(10)])
    code = (
        "import sys; from megatron_sharpness import cli; "
        f"assert cli.main(['report', {str(log)!r}]) == 0; "
        "sys.exit(bool({'matplotlib', 'plotly', 'tensorboard'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
