from __future__ import annotations

import json
import math

import pytest

from megatron_sharpness.core.measurement import (
    STATUSES,
    TAGS,
    Measurement,
    edge_of_stability,
    edge_of_stability_preconditioned,
)


def test_json_is_strict_and_has_the_promised_names() -> None:
    record = Measurement(
        iteration=3, consumed_samples=24, lr=0.1, batch="train", status="found",
        loss=math.nan, slope=math.inf, critical_lr=0.5,
    )  # fmt: skip
    line = record.to_json()
    assert "NaN" not in line and "Infinity" not in line
    values = json.loads(line)
    assert values["loss"] is None and values["slope"] is None and values["critical_lr"] == 0.5
    assert set(values) >= {
        "iteration", "consumed_samples", "lr", "loss", "slope", "critical_lr", "critical_lr_lower",
        "critical_lr_upper", "critical_sharpness", "directional_sharpness", "edge_of_stability",
        "edge_of_stability_preconditioned", "lr_over_critical", "update_norm", "evaluations",
        "seconds", "tokens", "batch", "status", "non_monotone",
    }  # fmt: skip


def test_scalars_leave_out_what_was_not_measured() -> None:
    record = Measurement(iteration=1, consumed_samples=8, lr=0.1, batch="train", status="failed")
    assert record.scalars() == {
        "critical-sharpness-evaluations": 0.0,
        "critical-sharpness-seconds": 0.0,
    }
    assert set(TAGS) == {
        "critical-sharpness", "critical-learning-rate", "learning-rate-over-critical",
        "directional-sharpness", "edge-of-stability", "critical-sharpness-evaluations",
        "critical-sharpness-seconds",
    }  # fmt: skip


def test_statuses_are_the_contract() -> None:
    assert STATUSES == (
        "found", "not_descent", "no_upper", "no_lower", "noise_limited", "non_finite", "exhausted",
        "skipped_step", "zero_lr", "failed",
    )  # fmt: skip


def test_edges_of_stability() -> None:
    assert edge_of_stability(0.01, 0.1) == pytest.approx(199.9)
    # Result 3.1 at β₁ = 0.9 and no decay: 38/η.
    assert edge_of_stability_preconditioned(0.01, 0.0, 0.9) == pytest.approx(3800.0)
