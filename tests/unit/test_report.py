"""``megatron-sharpness report``: reading, table and figure."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sharpness import cli
from megatron_sharpness.errors import InputError
from megatron_sharpness.measurement import STATUSES
from megatron_sharpness.report import format_table, read_records
from megatron_sharpness.report.records import column, read_tensorboard, read_training_log


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
        **{name: value if status == "found" else None for name, value in found.items()},
        **fields,
    }


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def test_records_are_ordered_and_a_resumed_run_replaces_its_own(tmp_path: Path) -> None:
    written = [record(20, loss=1.0), record(10), record(20, loss=2.0), record(20, batch="code")]
    records = read_records(write(tmp_path / "log.jsonl", written))
    assert [each["iteration"] for each in records] == [10, 20]
    assert records[1]["loss"] == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"iteration": 10}\n{"iterat', "line 2: not a measurement"),
        ("[1]\n", "line 1: not a measurement"),
        ('{"lr": 1}\n', "line 1: not a measurement"),
        ("\n", "holds no measurement"),
    ],
)
def test_lines_that_are_no_records_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_records(path)


def test_a_missing_log_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl: cannot be read (No such file or directory)" in capsys.readouterr().err


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
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["40", "50"]


TRAINING_LINE = (
    " [2026-01-01 00:00:00.0] iteration {:8d}/     100 | consumed samples:           16 | "
    "elapsed time per iteration (ms): 221.2 | learning rate: 1.000000E-03 | "
    "global batch size:    16 | lm loss: 3.5E+00 | loss scale: 1.0 | grad norm: 1.027 |\n"
)


def test_training_log_gives_loss_and_learning_rate(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("noise\n" + TRAINING_LINE.format(2) + TRAINING_LINE.format(1))
    curves = read_training_log(log)
    np.testing.assert_array_equal(curves.iteration, [1, 2])
    np.testing.assert_array_equal(curves.loss, [3.5, 3.5])
    np.testing.assert_array_equal(curves.lr, [1e-3, 1e-3])
    log.write_text("noise\n")
    with pytest.raises(InputError, match="no line of it reports an iteration"):
        read_training_log(log)


def test_tensorboard_gives_loss_and_learning_rate(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    writer: Any = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(tmp_path)
    for iteration in (1, 2):
        writer.add_scalar("lm loss", 3.5, iteration)
        writer.add_scalar("learning-rate", 0.25, iteration)
    writer.close()
    curves = read_tensorboard(tmp_path)
    np.testing.assert_array_equal(curves.iteration, [1, 2])
    np.testing.assert_array_equal(curves.loss, [3.5, 3.5])
    np.testing.assert_array_equal(curves.lr, [0.25, 0.25])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no event file in it has Megatron's"):
        read_tensorboard(tmp_path / "empty")


MISSED = [status for status in STATUSES if status != "found"]


@pytest.mark.parametrize(
    "records",
    [
        [record(10 * i) for i in range(1, 200)],
        [record(10)],
        [record(10, "failed"), record(20, "zero_lr", lr=0.0, loss=None)],
        [record(i, status) for i, status in enumerate(["found", *MISSED], start=1)],
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


def test_every_missed_measurement_is_marked() -> None:
    figure_module: Any = pytest.importorskip("matplotlib.figure")
    from megatron_sharpness.report.figure import _mark_missed

    axes = figure_module.Figure().subplots()
    records = [record(i, status) for i, status in enumerate(["found", *MISSED], start=1)]
    _mark_missed(axes, [*records, record(99, "failed")])
    marked = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert marked["failed (2)"] == [10, 99]
    assert len(marked) == len(MISSED)


def test_a_figure_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    log = write(tmp_path / "log.jsonl", [record(10)])
    for out in (tmp_path / "none" / "curves.png", tmp_path / "curves.unknown"):
        assert cli.main(["report", str(log), "--out", str(out)]) == 1
        assert f"--out {out}: cannot be written" in capsys.readouterr().err
