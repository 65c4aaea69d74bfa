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
