from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_sharpness.core.alarm import Alarm
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.sinks import (
    ConsoleSink,
    DeepSpeedSink,
    JsonLinesSink,
    TensorBoardSink,
    WandbSink,
)

FOUND = Measurement(
    iteration=20, consumed_samples=160, lr=0.01, batch="train", status="found", critical_lr=0.04,
    critical_sharpness=50.0, lr_over_critical=0.25, evaluations=3, seconds=0.5,
)  # fmt: skip
FAILED = Measurement(
    iteration=30, consumed_samples=240, lr=0.01, batch="train", status="failed", reason="no memory"
)


class Writer:
    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, int]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.seen[tag] = (value, step)

    def log(self, values: dict[str, float], step: int) -> None:
        self.seen |= {tag: (value, step) for tag, value in values.items()}


def test_tensorboard_has_every_tag_against_iterations_and_samples() -> None:
    writer = Writer()
    TensorBoardSink(writer).write(FOUND)
    assert writer.seen["critical-sharpness"] == (50.0, 20)
    assert writer.seen["critical-sharpness vs samples"] == (50.0, 160)
    assert writer.seen["critical-learning-rate"] == (0.04, 20)
    assert "directional-sharpness" not in writer.seen


def test_wandb_logs_at_the_iteration() -> None:
    run = Writer()
    WandbSink(run).write(FOUND)
    assert run.seen["learning-rate-over-critical"] == (0.25, 20)


def test_deepspeed_s_monitor_gets_every_tag_against_samples() -> None:
    seen: list[tuple[str, float, int]] = []
    engine = SimpleNamespace(global_samples=96, monitor=SimpleNamespace(write_events=seen.extend))
    DeepSpeedSink(engine).write(FOUND)
    assert ("Train/Samples/critical-sharpness", 50.0, 96) in seen
    assert len(seen) == len(FOUND.scalars())


def test_an_alarm_is_a_text_in_tensorboard_and_an_alert_in_wandb() -> None:
    seen: list[tuple[Any, ...]] = []
    writer = SimpleNamespace(add_text=lambda *given: seen.append(given))
    run = SimpleNamespace(alert=lambda **given: seen.append(tuple(given.values())))
    alarm = Alarm(iteration=30, threshold=1.0, ratios=(1.5, 2.0), on=True)
    TensorBoardSink(writer).alarm(alarm)
    WandbSink(run).alarm(alarm)
    assert seen == [
        ("critical-sharpness-alarm", str(alarm), 30), ("Critical sharpness", str(alarm), "WARN")
    ]  # fmt: skip
    assert "above 1 (1.5, 2)" in str(alarm)


def test_json_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    sink = JsonLinesSink(path)
    sink.write(FOUND)
    path.unlink()  # a log that is rotated away does not end the run
    sink.write(FAILED)
    sink.write(FOUND)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["status"] for line in lines] == ["failed", "found"]
    assert lines[0]["critical_lr"] is None and lines[0]["reason"] == "no memory"


def test_a_line_that_a_killed_run_has_cut_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"iteration": 1, "lr"')
    for _ in range(2):
        JsonLinesSink(path).write(FOUND)
    first, *others = path.read_text().splitlines()
    assert first == '{"iteration": 1, "lr"' and others == [FOUND.to_json()] * 2


def test_the_console_says_what_was_found_and_why_not() -> None:
    lines: list[Any] = []
    sink = ConsoleSink(lines.append)
    sink.write(FOUND)
    sink.write(FAILED)
    assert "critical sharpness: 5.000000E+01" in lines[0] and "evaluations: 3" in lines[0]
    sink.write(replace(FOUND, part="mlp"))
    assert lines[2].startswith(" critical sharpness of part mlp at iteration ")
    assert "status: failed | no memory" in lines[1] and "critical learning rate" not in lines[1]
