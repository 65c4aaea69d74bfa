"""Optimizers of other libraries: measured right, or with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trainers.harness import require, worker_fixture

PATHS = [*require("optimizers", "pytorch_optimizer"), *require("hf", "accelerate")]
alone = worker_fixture("optimizers_worker", "alone", 0, PATHS)

NAMES = ("schedule-free AdamW", "schedule-free SGD", "Lookahead", "SAM", "Lion", "Prodigy",
         "accelerate", "AdamW")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_it_is_measured_as_any_other(name: str, alone: list[dict[str, Any]]) -> None:
    result = alone[0][name]
    assert result["same"]
    assert [record["iteration"] for record in result["records"]] == [3, 6]
    for record in result["records"]:
        assert record["status"] == "found", record["reason"]
        assert record["loss"] == pytest.approx(record["trained"], rel=1e-6)
        if record["true"] is not None:
            assert record["critical_lr"] == pytest.approx(record["true"], rel=1e-3)
    if name in ("SAM", "schedule-free AdamW"):  # whose gradients are not those of the step's begin
        assert all(record["slope"] is None for record in result["records"])


def test_weights_that_its_evaluation_swaps_stay(alone: list[dict[str, Any]]) -> None:
    result = alone[0]["schedule-free, swapped"]
    assert result["same"]
    for record in result["records"]:
        assert record["status"] == "failed" and "swapped by" in record["reason"]
