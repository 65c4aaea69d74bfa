"""The point estimate: one or two evaluations where they are enough, and how sure it says it is."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from megatron_sharpness.search import SearchResult, find_critical_lr
from tests.unit.test_search import check, quadratic

MEASURED = Path(__file__).parents[2] / "benchmarks/results/passes.json"


def search(power: float, guess: float, fall: float = 0.03, slope: float = 1.0) -> SearchResult:
    """On y = (η/η_c)^p with η_c = 1, where s·η_c is `fall` of the loss."""
    loss = 1 / fall
    result = find_critical_lr(
        lambda eta: loss + eta * (eta**power - 1),
        loss=loss,
        guess=guess,
        slope=slope,
        method="point",
    )
    check(result, loss, 1 / 16, 40)
    return result


@pytest.mark.parametrize("guess", [0.97, 1.03])
def test_one_evaluation_next_to_the_critical_lr(guess: float) -> None:
    result = search(1.0, guess)
    assert (result.status, result.evaluations) == ("estimated", 1)
    assert result.eta == pytest.approx(1, rel=result.error)


@pytest.mark.parametrize("guess", [0.4, 2.5])
def test_two_evaluations_farther_away(guess: float) -> None:
    result = search(0.97, guess)
    assert (result.status, result.evaluations) == ("estimated", 2)
    assert result.eta == pytest.approx(1, rel=2 * result.error)


def test_stated_uncertainty_holds_where_the_loss_bends_as_gpts_do() -> None:
    """Exponents as spread as the uncertainty supposes: 95 of 100 within twice what is stated."""
    rng = random.Random(0)
    within, estimated = 0, 0
    for _ in range(500):
        result = search(rng.gauss(0.97, 0.05), math.exp(rng.gauss(0.0, 0.3)))
        if result.status == "estimated":
            estimated += 1
            within += abs(math.log(result.eta)) <= 2 * result.error
    assert estimated > 450
    assert within > 0.95 * estimated


@pytest.mark.parametrize(
    ("power", "guess", "fall", "slope"),
    [
        (1.0, 2.5, 0.03, 0.1),
        (1.0, 2.5, 0.03, 0.3),
        (2.0, 6.0, 0.003, 2.0),  # two predictions that are too far apart
        (0.3, 6.0, 0.03, 2.0),  # two that agree, by a secant that contradicts their prior
    ],
)
def test_predictions_that_disagree_fall_back_to_a_bracket(
    power: float, guess: float, fall: float, slope: float
) -> None:
    """With a slope that is not the loss's (1), or a loss that bends as no language model's does."""
    result = search(power, guess, fall, slope)
    assert result.status == "found"
    assert result.lower <= 1 < result.upper and result.error is None


@pytest.mark.parametrize("slope", [None, -1.0, 0.0, math.nan])
def test_without_a_slope_that_falls_there_is_a_bracket(slope: float | None) -> None:
    loss = quadratic(2.0, 8.0)
    result = find_critical_lr(loss, loss=3.0, guess=0.45, slope=slope, method="point")
    certified = find_critical_lr(loss, loss=3.0, guess=0.45, slope=slope)
    assert result == certified and result.status == "found"


def test_far_from_quadratic_one_evaluation_is_not_enough() -> None:
    assert search(1.0, 1.01, fall=0.3).evaluations > 1


def test_a_tolerance_that_cannot_be_promised_gets_a_bracket() -> None:
    loss = quadratic(2.0, 8.0)
    result = find_critical_lr(
        loss, loss=3.0, guess=0.2, slope=2.0, method="point", tolerance=1e-6
    )
    assert result.status == "found"


def test_measured_error_is_as_stated() -> None:
    """On GPTs in training, those that nothing was tuned on."""
    rows = {
        (row["method"], row["cadence"]): row
        for row in json.loads(MEASURED.read_text())["results"]
        if row["group"] == "held out" and row["phase"] == "step >= 20"
    }
    for cadence in ("every step", "every 10", "every 100", "cold"):
        row = rows["point", cadence]
        assert row["median_error_of_eta"] < 0.01
        assert row["within_twice_stated"] > 0.93
        assert row["mean"] < rows["certified", cadence]["mean"] - 1
