"""The numbers are in Megatron's TensorBoard logs, and nothing else there has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sharpness.core.measurement import TAGS
from tests.megatron.harness import Run, run

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(result: Run) -> dict[str, list[tuple[int, float]]]:
    events = accumulator.EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tags_are_added_and_the_others_are_untouched(tmp_path: Path) -> None:
    flags = "--tensor-model-parallel-size 2 --bf16"
    log = tmp_path / "elsewhere" / "records.jsonl"
    plain = scalars(run(tmp_path / "plain", flags, processes=2).expect_success())
    result = run(tmp_path / "measured", f"{flags} --critical-sharpness-log {log}", processes=2,
                 every=2).expect_success()  # fmt: skip
    measured = scalars(result)

    added = {f"{tag}{twin}" for tag in TAGS for twin in ("", " vs samples")}
    assert set(measured) - set(plain) == added
    for tag, values in plain.items():
        if "time" not in tag:
            assert measured[tag] == values, tag
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for tag, field in TAGS.items():
        recorded = [record[field] for record in records]
        assert [step for step, _ in measured[tag]] == [2, 4, 6]
        assert [step for step, _ in measured[f"{tag} vs samples"]] == [16, 32, 48]
        assert [value for _, value in measured[tag]] == pytest.approx(recorded, rel=1e-6)
    assert result.output.count("critical sharpness at iteration") == 3
    assert result.output.count("critical sharpness: verdict: too few measurements to tell") == 1


def test_an_alarm_is_told_and_looked_at_closer_with_training_unchanged(tmp_path: Path) -> None:
    alarm = "--critical-sharpness-alarm 1e-4 --critical-sharpness-alarm-every 1"
    saving = f"--save {tmp_path / 'checkpoints'} --save-interval 5"
    plain = run(tmp_path / "plain", "--bf16 --hidden-dropout 0 --attention-dropout 0")
    measured = run(
        tmp_path / "measured", f"--bf16 --hidden-dropout 0 --attention-dropout 0 {alarm} "
        f"--critical-sharpness-alarm-after 2 {saving} --exit-interval 5", every=2,
    )  # fmt: skip
    resumed = run(
        tmp_path / "resumed", f"--bf16 --hidden-dropout 0 --attention-dropout 0 {alarm} "
        f"--critical-sharpness-alarm-after 2 --load {tmp_path / 'checkpoints'}", every=2,
    )  # fmt: skip
    lines = measured.expect_success().training_lines + resumed.expect_success().training_lines
    assert lines == plain.expect_success().training_lines
    assert [record["iteration"] for record in measured.records] == [2, 4, 5]
    assert [record["iteration"] for record in resumed.records] == [6]
    assert measured.output.count("critical sharpness: ALARM at iteration 4: ") == 1
    assert "ALARM" not in resumed.output  # it goes on
    events = accumulator.EventAccumulator(str(measured.folder / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("critical-sharpness-alarm/text_summary")
    assert text.step == 4 and b"ALARM at iteration 4" in text.tensor_proto.string_val[0]


def test_a_part_that_nothing_is_of_is_refused_before_the_first_step(tmp_path: Path) -> None:
    parts = "--critical-sharpness-parts norms=norm head=lm_head"
    result = run(tmp_path, f"--pipeline-model-parallel-size 2 {parts}", processes=2, every=2)
    assert result.returncode != 0 and not result.training_lines
    assert "InputError: --critical-sharpness-parts head=lm_head: " in result.output
    assert "decoder.layers." in result.output  # such are the names
