from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest

from megatron_sharpness.core.checks import (
    SAME,
    SAME_IN_16_BITS,
    WrongLoss,
    agrees,
    is_exact,
    repeat_error,
    replay_error,
    slope_ratio,
    wrong_slope,
)
from megatron_sharpness.core.search import Probe


def values(*losses: float) -> Iterator[float]:
    return itertools.cycle(losses)


def test_a_loss_that_repeats_has_no_error_and_is_evaluated_once() -> None:
    assert repeat_error(2.5, lambda: 2.5, SAME) == 0.0


def test_a_loss_that_nearly_repeats_is_evaluated_four_times() -> None:
    again = values(2.5001, 2.4999, 2.5001)
    assert repeat_error(2.5, lambda: next(again), SAME) == pytest.approx(9.57e-5, rel=1e-2)


@pytest.mark.parametrize("other", [2.51, 3.0, math.nan])
def test_another_batch_at_each_call_is_told(other: float) -> None:
    with pytest.raises(WrongLoss, match=r"does not repeat.*another batch at each call"):
        repeat_error(2.5, lambda: other, SAME_IN_16_BITS)


def test_a_replay_is_compared_with_the_training_loss() -> None:
    assert is_exact(replay_error(2.5 + 1e-6, 2.5, SAME), 2.5)
    error = replay_error(2.5 + 1e-4, 2.5, SAME)
    assert error == pytest.approx(1e-4) and not is_exact(error, 2.5)
    assert replay_error(1e-7, 0.0, SAME) == 1e-7  # of a loss that is 0 in the mean
    assert not is_exact(None, 2.5)


@pytest.mark.parametrize("wrong", [2.5 / 512, 2.6, 2.495, -2.5, math.nan])
def test_another_loss_than_the_trained_one_is_told(wrong: float) -> None:
    with pytest.raises(WrongLoss, match=r"trained on 2\.5 .*a mean where the sum"):
        replay_error(wrong, 2.5, SAME_IN_16_BITS)


def test_in_fp32_it_takes_less_to_be_another_loss() -> None:
    assert replay_error(2.501, 2.5, SAME_IN_16_BITS) == pytest.approx(1e-3)
    with pytest.raises(WrongLoss, match=r"trained on 2\.5 "):
        replay_error(2.501, 2.5, SAME)
    assert repeat_error(2.5, lambda: 2.501, SAME_IN_16_BITS) > 0
    with pytest.raises(WrongLoss, match="does not repeat"):
        repeat_error(2.5, lambda: 2.501, SAME)


def line(eta: float) -> float:
    return 3.0 - 2.0 * eta * (1 - eta / 0.1)


def test_the_slope_of_the_loss_agrees_at_the_price_of_one_evaluation() -> None:
    calls: list[float] = []

    def loss_at(eta: float) -> float:
        calls.append(eta)
        return line(eta)

    ratio = slope_ratio(3.0, 2.0, 1e-6, (), 0.1, loss_at)
    assert ratio == pytest.approx(15 / 16) and agrees(ratio) and len(calls) == 1
    made = (Probe(0.1, 3.0), Probe(0.004, line(0.004)))
    assert slope_ratio(3.0, 2.0, 1e-6, made, 0.1, loss_at) == pytest.approx(0.96)
    assert len(calls) == 1  # a probe of the search did


@pytest.mark.parametrize("factor", [0.0, 1 / 512, 0.2, 0.5, 2.0, 5.0, -1.0])
def test_a_loss_that_does_not_fall_as_its_slope_says_is_tried_twice(factor: float) -> None:
    calls: list[float] = []

    def loss_at(eta: float) -> float:
        calls.append(eta)
        return 3.0 + factor * (line(eta) - 3.0)

    ratio = slope_ratio(3.0, 2.0, 1e-6, (), 0.1, loss_at)
    assert ratio == pytest.approx(factor, rel=0.1) and not agrees(ratio)
    assert calls[1] == calls[0] / 8
    assert f"{ratio:.3g} times" in wrong_slope(ratio)


def test_a_loss_that_bends_soon_agrees_at_the_second_try() -> None:
    def loss_at(eta: float) -> float:
        return 3.0 - 2.0 * eta * (1 - min(1.0, (eta / 0.01) ** 0.5))

    assert agrees(slope_ratio(3.0, 2.0, 1e-6, (), 0.1, loss_at) or 0.0)


@pytest.mark.parametrize(("factor", "told"), [(0.1, True), (0.45, False)])
def test_without_a_second_look_it_takes_more_to_disagree(factor: float, told: bool) -> None:
    def loss_at(eta: float) -> float:
        return 3.0 + factor * (line(eta) - 3.0)

    assert (slope_ratio(3.0, 2.0, 0.005, (), 0.1, loss_at) is not None) == told


def test_nothing_is_said_where_nothing_can_be_seen() -> None:
    def never(eta: float) -> float:
        raise AssertionError

    assert slope_ratio(3.0, 2.0, 0.05, (), 0.1, never) is None
    assert slope_ratio(0.0, 2.0, 1e-6, (), None, never) is None
