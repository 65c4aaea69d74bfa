"""The recommendation of a sweep, and the controller of a mix, on numbers with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_sharpness.adaptive_mix.controller import MixController
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.sweeps.mix.recommendation import ENOUGH, INTERVAL, recommend

SHARES = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def sweep(scatter: float = 0.0, batches: int = 20) -> dict[float, dict[str, list[float]]]:
    """η_c = 2/λ is linear in the share: of prose it grows, of code it falls, equal at 0.55."""
    generator = np.random.default_rng(1)

    def values(eta: float) -> list[float]:
        return list(2 / eta * np.exp(scatter * generator.standard_normal(batches)))

    return {
        share: {
            "prose": values(0.01 * (1 + 1.2 * (share - 0.55))),
            "code": values(0.01 * (1 - 1.2 * (share - 0.55))),
        }
        for share in SHARES
    }


def test_the_share_with_the_smallest_largest_sharpness_is_recommended() -> None:
    found = recommend(sweep())
    assert found.share == 0.6
    assert found.limits == "code"
    assert found.critical_sharpness == pytest.approx(2 / 0.0094)
    assert found.lr == pytest.approx(0.0094)
    assert found.crossing == pytest.approx(0.55)
    assert found.crossing_interval == pytest.approx((0.55, 0.55))
    assert found.lr_interval == pytest.approx((found.lr, found.lr))
    assert found.votes == {share: float(share == 0.6) for share in SHARES} | {0.6: pytest.approx(1)}


def test_scatter_shows_in_the_intervals_and_the_votes() -> None:
    little, much = recommend(sweep(0.05)), recommend(sweep(1.0))
    assert little.lr_interval[0] < 0.0094 < little.lr_interval[1] * 1.05
    assert little.votes[0.6] > 0.8
    assert sum(much.votes.values()) == pytest.approx(1)
    low, high = little.crossing_interval or (0, 0)
    assert low < 0.56 and 0.54 < high < low + 0.1
    wide = much.lr_interval[1] / much.lr_interval[0]
    assert wide > little.lr_interval[1] / little.lr_interval[0]
    assert recommend(sweep(1.0)) == much  # seeded


def held(batches: int) -> float:
    """How often the bootstrap's 90 % interval of a median holds it, whatever the distribution."""
    n, middle = batches, batches // 2

    def at_most(rank: int) -> float:
        """The part of the draws whose median is among the lowest values, so many of them."""
        p = rank / n
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(middle + 1, n + 1))

    low, high = (
        next(k for k in range(1, n + 1) if at_most(k) >= part)
        for part in ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2)
    )
    return sum(math.comb(n, i) for i in range(low, high)) / 2**n


def test_an_interval_of_enough_batches_holds_the_median_about_as_often_as_it_says() -> None:
    assert held(3) == 0.75 and held(10) == pytest.approx(0.773, abs=1e-3)
    assert all(0.85 <= held(batches) < 0.925 for batches in range(ENOUGH, 101))
    assert recommend(sweep(batches=7)).batches == 7


def test_where_one_task_limits_everywhere_nothing_crosses() -> None:
    one = {share: {"prose": [3.0 - share], "code": [1.0]} for share in SHARES}
    found = recommend(one)
    assert (found.share, found.limits, found.crossing) == (1.0, "prose", None)
    assert found.crossing_interval is None


def test_a_loss_that_rises_at_once_keeps_its_share_out() -> None:
    values = sweep()
    values[0.6]["prose"] = [math.inf] * 20
    values[0.4]["prose"][:5] = [math.inf] * 5  # the median is none the worse
    found = recommend(values)
    assert found.share == 0.4
    everywhere = {share: {"prose": [math.inf], "code": [1.0]} for share in SHARES}
    assert recommend(everywhere).lr == 0.0


def test_a_crossing_beside_a_loss_that_rises_at_once_lies_between() -> None:
    found = recommend(
        {0.5: {"prose": [math.inf], "code": [200.0]}, 0.75: {"prose": [400.0], "code": [800.0]}}
    )
    # η_c: prose 0 and 0.005, code 0.01 and 0.0025, linear in between.
    assert found.crossing == pytest.approx(0.5 + 0.25 * 0.01 / 0.0125)


def test_a_sweep_with_holes_is_refused() -> None:
    with pytest.raises(InputError, match="no share"):
        recommend({})
    with pytest.raises(InputError, match=r"share 0\.5: every task needs a value"):
        recommend({0.5: {"prose": [1.0], "code": []}})
    with pytest.raises(InputError, match=r"share 0\.5: every task needs a value"):
        recommend({0.1: {"prose": [1.0], "code": [2.0]}, 0.5: {"prose": [1.0]}})


def controller(share: float, **options: float) -> MixController:
    return MixController(share, gains="prose", loses="code", every=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0.1, 0.9])
def test_the_share_goes_to_where_the_tasks_meet_and_stays(start: float) -> None:
    mix = controller(start)
    for _ in range(200):
        before = mix.share
        mix.observe(
            {
                "prose": math.exp(6 - 2 * (mix.share - 0.55)),
                "code": math.exp(6 + 2 * (mix.share - 0.55)),
            }
        )
        assert abs(mix.share - before) <= mix.rate + 1e-12
    assert mix.share == pytest.approx(0.55, abs=1e-3)


def test_it_adjusts_after_every_so_many_measurements_by_their_mean() -> None:
    mix = controller(0.5)
    assert not mix.observe({"prose": math.e, "code": 1.0})
    assert not mix.observe({"prose": 5.0})  # without both it does not count
    assert mix.share == 0.5
    assert mix.observe({"prose": 1.0, "code": math.exp(0.5)})
    assert mix.share == pytest.approx(0.5 + 0.1 * (1 - 0.5) / 2)


def test_bounds_and_rate_hold() -> None:
    mix = controller(0.9, upper=0.92, lower=0.5)
    for _ in range(10):
        mix.observe({"prose": math.inf, "code": 1.0})
    assert mix.share == 0.92
    mix.observe({"prose": 1.0, "code": math.inf}), mix.observe({"prose": 1.0, "code": math.inf})
    assert mix.share == pytest.approx(0.87)
    mix.observe({"prose": math.inf, "code": math.inf})
    mix.observe({"prose": 0.0, "code": 0.0})
    assert mix.share == pytest.approx(0.87)
    mix.observe({"prose": 0.0, "code": 1.0})  # the loss of prose never rises
    mix.observe({"prose": 0.0, "code": 1.0})
    assert mix.share == pytest.approx(0.82)


def test_it_resumes_where_it_was() -> None:
    seen = [{"prose": 3.0, "code": 1.0}, {"prose": 1.0, "code": 7.0}, {"prose": 9.0, "code": 2.0}]
    whole, part = controller(0.5), controller(0.5)
    for i, sharpness in enumerate(seen):
        whole.observe(sharpness)
        part.observe(sharpness)
        resumed = controller(0.3)
        resumed.load_state_dict(part.state_dict())
        part = resumed
        assert (part.share, part.seen) == (whole.share, whole.seen), i


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.2}, "share=1.2"),
        ({"share": 0.01}, "within its bounds"),
        ({"share": 0.5, "rate": -0.1}, "rate=-0.1"),
        ({"share": 0.5, "gain": 0.0}, "gain=0.0"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        controller(**options)
