"""A loss is above or below L(θ) only where it is so by more than its noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from megatron_sharpness.core.search import SearchResult, find_critical_lr, find_critical_lrs
from megatron_sharpness.core.search.probes import STANDS_OUT

SLOPE, CRITICAL, START = 0.5, 0.2, 3.0
FALL = SLOPE * CRITICAL


def noisy(noise: float, seed: int = 0) -> Callable[[float], float]:
    rng = random.Random(seed)
    return lambda eta: START + SLOPE * eta * (eta / CRITICAL - 1) + rng.gauss(0, noise)


def search(loss_at: Callable[[float], float], noise: float, **options: float) -> SearchResult:
    given = {"guess": CRITICAL, "slope": SLOPE} | options
    return find_critical_lr(loss_at, loss=START, noise=noise, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["certified", "bisection"])
@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-3, 3e-3])
def test_both_ends_of_what_is_found_stand_out(method: str, relative: float) -> None:
    noise, found = relative * FALL, 0
    for seed in range(100):
        result = search(noisy(noise, seed), noise, method=method, guess=0.13 + 0.001 * seed)  # type: ignore[arg-type]
        if result.status != "found":
            continue
        found += 1
        losses = {probe.lr: probe.loss for probe in result.probes}
        assert losses[result.lower] - START <= -STANDS_OUT * noise  # type: ignore[index]
        assert losses[result.upper] - START > STANDS_OUT * noise  # type: ignore[index]
        assert result.eta == pytest.approx(CRITICAL, rel=0.05)
        assert result.eta is not None and result.error is not None
        assert abs(result.eta / CRITICAL - 1) < 5 * result.error
    assert found > 90


@pytest.mark.parametrize("method", ["certified", "bisection"])
def test_a_fall_within_the_noise_is_noise_limited(method: str) -> None:
    noise = 0.1 * FALL  # at η_c/2 the loss falls by 2.5 times that
    statuses = {search(noisy(noise, s), noise, method=method).status for s in range(50)}  # type: ignore[arg-type]
    assert statuses == {"noise_limited"}


def test_a_bracket_narrower_than_the_noise_allows_is_noise_limited() -> None:
    noise = 1e-3 * FALL
    assert search(noisy(noise), noise, tolerance=1e-4).status == "noise_limited"
    assert search(noisy(noise), noise).status == "found"


@pytest.mark.parametrize("guess", [1e-9, 1e-7, 1e-5])
def test_a_guess_within_the_noise_is_moved_to_where_a_fall_can_be_seen(guess: float) -> None:
    noise = 1e-4 * FALL
    result = search(noisy(noise), noise, guess=guess)
    assert result.probes[0].lr == pytest.approx(100 * noise / SLOPE)
    assert result.status == "found" and result.evaluations <= 6
    assert search(noisy(0.0), 0.0, guess=guess).probes[0].lr == guess


def test_weights_that_do_not_follow_the_line_move_the_guess_too() -> None:
    result = search(noisy(0.0), 0.0, guess=1e-9, resolution=1e-3)
    assert result.probes[0].lr == 1e-3 and result.status == "found"
    assert search(noisy(0.0), 0.0, guess=CRITICAL, resolution=1e-3).probes[0].lr == CRITICAL


def test_a_level_loss_is_closed_in_from_both_sides() -> None:
    """The guess is η_c itself: half a window to each side ends it."""
    result = search(noisy(0.0), 1e-3 * FALL)
    assert result.status == "found" and result.evaluations == 3
    assert result.lower is not None and result.upper is not None
    assert result.lower < CRITICAL < result.upper


def test_noise_that_was_taken_for_too_small_by_three_is_survived() -> None:
    wrong = 0
    for seed in range(2000):
        rng = random.Random(seed)
        noise = FALL * 10 ** rng.uniform(-6, -1)
        guess = CRITICAL * 10 ** rng.uniform(-4, 1)
        result = search(noisy(noise, seed), noise / 3, guess=guess)
        wrong += result.eta is not None and abs(math.log(result.eta / CRITICAL)) > math.log(2)
    assert wrong <= 2


@pytest.mark.parametrize("method", ["certified", "bisection"])
def test_a_loss_on_other_data_that_does_not_fall_is_said_to_be_so(method: str) -> None:
    rng = random.Random(0)
    results = find_critical_lrs(
        lambda eta, names: {name: 5.0 + 30 * eta**2 + rng.gauss(0, 1e-6) for name in names},
        losses={"flat": 5.0},
        guesses={"flat": 0.1},
        noises={"flat": 1e-6},
        method=method,  # type: ignore[arg-type]
    )
    assert results["flat"].status == "noise_limited"


def test_an_ascent_that_is_seen_above_the_noise_is_one() -> None:
    rng = random.Random(0)
    results = find_critical_lrs(
        lambda eta, names: {name: 5.0 + 0.3 * eta + rng.gauss(0, 1e-5) for name in names},
        losses={"rises": 5.0},
        guesses={"rises": 0.1},
        noises={"rises": 1e-5},
    )
    assert results["rises"].status == "not_descent" and results["rises"].evaluations == 3


def test_an_ascent_within_noise_is_one_where_the_slope_says_so() -> None:
    rng = random.Random(0)

    def rises(eta: float) -> float:
        return START + 0.3 * eta + rng.gauss(0, 1e-4)

    result = find_critical_lr(rises, loss=START, guess=0.1, slope=-0.3, noise=1e-4)
    assert result.status == "not_descent" and result.eta is None


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("relative", [1e-7, 1e-4, 1e-2])
def test_a_guess_far_above_a_steep_loss_comes_back_to_where_a_fall_can_be_seen(
    known: bool, relative: float
) -> None:
    """Its rise there, of many powers of η, predicts an η_c next to θ, where all is level."""
    for seed in range(300):
        rng = random.Random(seed)
        power, critical = rng.uniform(1, 6), 10 ** rng.uniform(-3, 0)
        slope = 10 ** rng.uniform(-1.5, 1) / critical
        noise = relative * slope * critical

        def loss_at(eta: float) -> float:
            change = slope * eta * ((eta / critical) ** power - 1)  # noqa: B023
            return 3.0 + change + noise * rng.gauss(0, 1)  # noqa: B023

        result = find_critical_lr(
            loss_at,
            loss=loss_at(0.0),
            guess=critical * 10 ** rng.uniform(0, 4),
            slope=slope if known else None,
            noise=noise,
        )
        assert result.status == "found", (seed, result)
        assert result.evaluations <= 16


def steep(eta: float) -> float:
    return 3.0 + eta * (eta**5 - 1)


def test_no_probe_is_nearer_than_weights_follow_the_line_where_it_need_not_be() -> None:
    result = find_critical_lr(steep, loss=3.0, guess=1e4, slope=1.0, noise=1e-7, resolution=0.05)
    assert result.status == "found" and min(probe.lr for probe in result.probes) >= 0.05


def test_a_fall_that_the_slope_says_cannot_be_seen_is_not_looked_for() -> None:
    """At η_c the slope promises twice the noise, and four times stand out."""
    result = find_critical_lr(steep, loss=3.0, guess=1e4, slope=1.0, noise=0.5)
    assert result.status == "noise_limited" and result.evaluations <= 6
