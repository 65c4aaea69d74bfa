"""The rules that say where a run stands, on curves whose stages are known."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from megatron_sharpness.report.records import Array, Curve, Run, read_records
from megatron_sharpness.report.stages import (
    ABOVE_EDGE,
    BELOW_EDGE,
    CATAPULT_WITHIN,
    EARLY_TRANSIENT,
    EDGE_OF_STABILITY,
    INTERMEDIATE_SATURATION,
    LEAST,
    NOISE_RULE,
    PROGRESSIVE_SHARPENING,
    RULES,
    TOO_FEW,
    Stages,
    find_stages,
    stages_of,
    where_it_stands,
)
from tests.processes import ROOT

LINE = 200.0


def ratios(*parts: tuple[int, float, float]) -> Array:
    """λ_c / line in parts of (measurements, first, last), straight in the logarithm."""
    return np.concatenate([np.geomspace(first, last, n) for n, first, last in parts])


def noisy(values: Array, scatter: float, seed: int = 0) -> Array:
    return values * np.exp(scatter * np.random.default_rng(seed).standard_normal(len(values)))


def find(ratio: Array, line: Array | float = LINE, **more: Any) -> Stages:
    """Stages of a run that is measured every 10 iterations, from iteration 10 on."""
    edge = np.broadcast_to(line, len(ratio)).astype(float)
    status = more.pop("status", ["found"] * len(ratio))
    return find_stages(10.0 * np.arange(1, len(ratio) + 1), ratio * edge, edge, status, **more)


def names(stages: Stages) -> list[str]:
    return [stage.name for stage in stages.stages]


@pytest.mark.parametrize("scatter", [0.0, 0.05, 0.1])
def test_full_batch_training_goes_through_all_stages(scatter: float) -> None:
    ratio = ratios((20, 0.6, 0.1), (20, 0.1, 0.1), (30, 0.1, 1.0), (50, 1.0, 1.0))
    for seed in range(20):
        found = find(noisy(ratio, scatter, seed))
        assert names(found) == [
            EARLY_TRANSIENT, INTERMEDIATE_SATURATION, PROGRESSIVE_SHARPENING, EDGE_OF_STABILITY
        ]  # fmt: skip
        assert found.now == EDGE_OF_STABILITY
        assert not found.catapults
        ends = [stage.last for stage in found.stages]
        assert np.all(np.abs(np.array(ends) - [200, 400, 680, 1200]) <= 80), ends
        assert [s.first for s in found.stages] == [10, *(last + 10 for last in ends[:-1])]


@pytest.mark.parametrize("measurements", [20, 40, 100, 400])
@pytest.mark.parametrize("level", [0.25, 0.5, 0.75])
def test_mini_batch_training_below_the_line_is_nothing_else(
    level: float, measurements: int
) -> None:
    """At most one in ten of the curves, of the scatter that mini-batches have, is called more."""
    found = [find(noisy(np.full(measurements, level), 0.2, seed)) for seed in range(100)]
    assert sum(names(each) != [BELOW_EDGE] for each in found) <= 10
    assert sum(EDGE_OF_STABILITY in names(each) for each in found) <= (6 if level == 0.75 else 0)
    assert not any(each.catapults for each in found)


@pytest.mark.parametrize("scatter", [0.0, 0.1])
def test_the_edge_is_the_line_and_not_a_level(scatter: float) -> None:
    """As the learning rate decays the line rises: λ_c on it is at the edge, λ_c left behind not."""
    line = LINE / np.concatenate([np.ones(40), np.linspace(1, 0.1, 40)])
    assert names(find(noisy(np.ones(80), scatter), line)) == [EDGE_OF_STABILITY]
    left_behind = find(noisy(LINE / line, scatter), line)
    assert names(left_behind)[0] == EDGE_OF_STABILITY
    assert left_behind.now == BELOW_EDGE


def test_an_oscillation_from_step_to_step_around_the_line_is_the_edge() -> None:
    around = np.tile([0.85, 1.25], 30)
    for ratio in (around, around[1:], around[:-1]):
        assert names(find(ratio)) == [EDGE_OF_STABILITY]


def test_a_rise_of_the_line_alone_is_no_stage() -> None:
    line = np.geomspace(LINE, 20 * LINE, 60)
    assert names(find(0.5 * LINE / line, line)) == [BELOW_EDGE]


def test_staying_near_the_line_without_reaching_it_is_not_the_edge() -> None:
    assert names(find(np.full(60, 0.9))) == [BELOW_EDGE]
    assert names(find(np.full(60, 0.97))) == [EDGE_OF_STABILITY]


def test_passing_the_line_is_not_the_edge() -> None:
    assert EDGE_OF_STABILITY not in names(find(ratios((12, 0.2, 0.9), (4, 1, 1), (12, 0.9, 0.2))))


def test_staying_above_the_line_has_a_name() -> None:
    found = find(ratios((30, 0.5, 0.5), (30, 3.0, 3.0)))
    assert found.now == ABOVE_EDGE
    assert found.stages[-1].first == 310


def test_only_the_first_fall_is_the_early_transient() -> None:
    twice = find(ratios((10, 0.8, 0.2), (30, 0.2, 0.6), (30, 0.6, 0.1)))
    rests = (BELOW_EDGE, INTERMEDIATE_SATURATION)
    trends = [name for name in names(twice) if name not in rests]
    assert trends == [EARLY_TRANSIENT, PROGRESSIVE_SHARPENING]
    assert twice.now == BELOW_EDGE
    both_early = find(ratios((10, 0.8, 0.1), (8, 0.1, 0.7), (8, 0.7, 0.1), (80, 0.1, 0.1)))
    assert names(both_early).count(EARLY_TRANSIENT) == 1
    late = find(ratios((40, 0.6, 0.6), (20, 0.6, 0.1)))
    assert names(late) == [BELOW_EDGE]


def test_a_spike_at_the_start_belongs_to_the_early_transient() -> None:
    spike = ratios((1, 0.4, 0.4), (1, 0.9, 0.9), (8, 0.6, 0.1), (20, 0.1, 0.1), (30, 0.1, 0.8))
    found = find(spike)
    assert names(found) == [EARLY_TRANSIENT, INTERMEDIATE_SATURATION, PROGRESSIVE_SHARPENING]
    assert found.stages[0].first == 10


def test_a_short_rest_belongs_to_the_stage_before_it() -> None:
    rests = {n: ratios((12, 0.8, 0.2), (n, 0.2, 0.2), (12, 0.2, 0.8)) for n in (1, 20)}
    assert names(find(rests[1])) == [EARLY_TRANSIENT, PROGRESSIVE_SHARPENING]
    assert names(find(rests[20])) == [
        EARLY_TRANSIENT, INTERMEDIATE_SATURATION, PROGRESSIVE_SHARPENING
    ]  # fmt: skip


def test_only_a_rest_before_a_rise_at_a_steady_rate_is_a_saturation() -> None:
    rest_and_rise = ratios((40, 0.2, 0.2), (30, 0.2, 0.8))
    assert names(find(rest_and_rise)) == [INTERMEDIATE_SATURATION, PROGRESSIVE_SHARPENING]
    assert names(find(rest_and_rise[:40])) == [BELOW_EDGE]  # has not risen yet
    decays = np.concatenate([np.full(40, LINE), np.geomspace(LINE, 20 * LINE, 30)])
    rises_with_the_line = ratios((40, 0.2, 0.2), (30, 0.2, 0.1))
    assert names(find(rises_with_the_line, decays)) == [BELOW_EDGE, PROGRESSIVE_SHARPENING]
    falls_between = ratios((40, 0.1, 0.1), (20, 0.1, 0.3), (20, 0.3, 0.1), (20, 0.1, 0.8))
    assert names(find(falls_between)) == [
        INTERMEDIATE_SATURATION, PROGRESSIVE_SHARPENING, BELOW_EDGE, PROGRESSIVE_SHARPENING
    ]  # fmt: skip


def test_an_odd_batch_changes_no_stage() -> None:
    ratio = ratios((40, 0.3, 0.3))
    ratio[[10, 25]] = 0.05, 0.9
    assert names(find(ratio)) == [BELOW_EDGE]


@pytest.mark.parametrize("measurements", range(LEAST))
def test_a_short_run_is_not_judged(measurements: int) -> None:
    found = find(np.full(measurements, 1.0))
    assert found == Stages((), ())
    assert found.now == TOO_FEW
    assert names(find(np.full(LEAST, 0.5))) == [BELOW_EDGE]


def test_measurements_that_found_nothing_are_left_out() -> None:
    ratio = ratios((30, 0.2, 0.2), (30, 1.0, 1.0))
    status = np.full(60, "found", dtype=object)
    status[::3] = "exhausted"
    ratio[::3] = np.nan
    ratio[3] = 1e9  # a bracket's end, say
    found = find(ratio, status=list(status))
    assert found.now == EDGE_OF_STABILITY
    assert not found.catapults
    assert found.stages[0].first == 20
    assert find(ratio, status=["failed"] * 60).now == TOO_FEW


def test_where_it_stands_says_when_that_was_seen() -> None:
    def record(iteration: int, status: str = "found") -> dict[str, Any]:
        values = {"critical_sharpness": 0.5 * LINE, "edge_of_stability": LINE, "loss": 2.0}
        return {"iteration": iteration, "status": status, **values}

    found = [record(10 * i) for i in range(1, 9)]
    assert where_it_stands(Run("run", found)) == BELOW_EDGE
    now = where_it_stands(Run("run", [*found, record(90, "no_upper")]))
    assert now == f"{BELOW_EDGE}, as of iteration 80"


CATAPULT = ratios((30, 0.7, 0.7), (1, 1.3, 1.3), (1, 1.6, 1.6), (1, 0.9, 0.9), (30, 0.2, 0.2))


def test_a_catapult_is_found_with_its_loss_spike() -> None:
    iteration = np.arange(1.0, 640.0)
    loss = np.where((iteration > 312) & (iteration < 318), 6.0, 2.0)
    (event,) = find(CATAPULT, loss=Curve(iteration, loss)).catapults
    assert (event.first, event.peak, event.last) == (310, 320, 340)
    assert event.ratio == pytest.approx(1.6)
    assert event.loss_ratio == pytest.approx(3.0)
    assert str(event) == "310–340: λ_c 1.6 × the line, loss spike of 3 × the loss before"
    quiet = Curve(iteration, np.full(len(loss), 2.0))
    (event,) = find(CATAPULT, loss=quiet).catapults
    assert str(event).endswith("no loss spike seen")
    (event,) = find(CATAPULT).catapults
    assert event.loss_ratio is None
    assert str(event).endswith("loss not known")


def test_two_catapults_are_two() -> None:
    assert len(find(np.concatenate([CATAPULT, CATAPULT])).catapults) == 2


@pytest.mark.parametrize(
    "ratio",
    [
        pytest.param(ratios((30, 0.7, 0.7), (30, 1.5, 1.5)), id="does not fall back"),
        pytest.param(ratios((30, 0.7, 0.7), (3, 1.5, 1.5), (30, 0.9, 0.9)), id="falls a little"),
        pytest.param(ratios((30, 0.4, 0.4), (1, 0.99, 0.99), (30, 0.4, 0.4)), id="stays below"),
        pytest.param(
            ratios((30, 0.7, 0.7), (1, 1.5, 1.5), (CATAPULT_WITHIN, 1.0, 1.0), (30, 0.2, 0.2)),
            id="falls much later",
        ),
        pytest.param(
            ratios((5, 5.0, 5.0), (30, 2.4, 2.4)),
            id="falls and is above still",
        ),
        pytest.param(
            np.insert(noisy(np.full(60, 0.7), 0.2), 30, 1.5), id="no more than the scatter"
        ),
    ],
)
def test_what_is_no_catapult(ratio: Array) -> None:
    assert not find(ratio).catapults


def test_the_quick_start_reduces_rests_and_sharpens_in_the_decay() -> None:
    run = Run("quickstart", read_records(ROOT / "benchmarks/results/quickstart.jsonl"))
    found = stages_of(run)
    assert names(found) == [EARLY_TRANSIENT, BELOW_EDGE, PROGRESSIVE_SHARPENING]
    assert 300 <= found.stages[-1].first <= 340  # the decay begins at 300
    assert not found.catapults


def test_the_page_of_the_documentation_has_the_rules_as_they_are() -> None:
    page = re.sub(r"\s+", " ", (ROOT / "docs/report.md").read_text())
    for name, rule in RULES.items():
        assert f"**{name}**: {rule}" in page
    assert NOISE_RULE in page
