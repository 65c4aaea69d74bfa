"""The constants of the search matter to its cost, and never to what it returns."""

from __future__ import annotations

import math
import random

import pytest

from megatron_sharpness.core.search import certified, find_critical_lr, prediction

FITTED = [
    (prediction, "TYPICAL_FALL"), (prediction, "LEAST_POWER"), (prediction, "HALF_AT"),
    (prediction, "MOST_CORRECTED"), (prediction, "PROMISED"), (prediction, "UNBENT"),
    (certified, "NEARLY"), (certified, "PAST"), (certified, "OUTWARDS"),
]  # fmt: skip


@pytest.mark.parametrize("factor", [1.0, 1 / 3, 3.0])
@pytest.mark.parametrize(("module", "name"), FITTED)
def test_each_off_by_three_costs_evaluations_alone(
    module: object, name: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, getattr(module, name) * factor)
    evaluations = 0
    for seed in range(300):
        rng = random.Random(seed)
        power, loss = rng.uniform(0.15, 1.5), rng.uniform(0.5, 10)
        critical = 10 ** rng.uniform(-4, 0)
        slope = loss * 10 ** rng.uniform(-2, 1.5) / critical
        known = slope if rng.random() < 0.7 else None
        result = find_critical_lr(
            lambda eta: loss + slope * eta * ((eta / critical) ** power - 1),  # noqa: B023
            loss=loss,
            guess=critical * 10 ** rng.gauss(0, 0.3),
            slope=known,
        )
        assert result.status == "found"
        assert result.lower is not None and result.upper is not None and result.eta is not None
        assert result.lower * (1 - 1e-12) <= critical <= result.upper * (1 + 1e-12)
        assert 1 - result.lower / result.upper <= 1 / 4
        assert math.log(result.eta / critical) == pytest.approx(0, abs=0.01)
        evaluations += result.evaluations
    assert evaluations / 300 < 4.5
