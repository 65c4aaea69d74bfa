"""The line search against closed forms, every ending by name, and hostile landscapes."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sharpness.core.directional import estimate_directional_sharpness
from megatron_sharpness.core.search import (
    TOLERANCES,
    Method,
    SearchResult,
    SearchStatus,
    find_critical_lr,
)

METHODS = tuple(TOLERANCES)
both_methods = pytest.mark.parametrize("method", METHODS)


def quadratic(slope: float, curvature: float, loss: float = 3.0) -> Callable[[float], float]:
    """L(η) = L0 - ηs + η²c/2, with η_c = 2s/c."""
    return lambda eta: loss - eta * slope + eta**2 * curvature / 2


def check(result: SearchResult, loss: float, tolerance: float, max_evaluations: int) -> None:
    """What every result promises, whatever the landscape."""
    above = [p.lr for p in result.probes if not (math.isfinite(p.loss) and p.loss <= loss)]
    below = [p.lr for p in result.probes if math.isfinite(p.loss) and p.loss <= loss]
    assert result.status in get_args(SearchStatus)
    assert result.evaluations == len(result.probes) <= max_evaluations
    assert all(0 < p.lr < math.inf for p in result.probes)
    assert len({p.lr for p in result.probes}) == len(result.probes)
    assert result.upper == min(above, default=None)
    assert result.lower == max(
        (lr for lr in below if lr < min(above, default=math.inf)), default=None
    )
    assert result.non_monotone == (min(above, default=math.inf) < max(below, default=0))
    if result.status == "found":
        assert result.lower is not None and result.upper is not None and result.eta is not None
        assert abs(1 - result.lower / result.upper) <= tolerance
        assert result.lower <= result.eta <= result.upper
        assert result.error is not None and 0 <= result.error < math.inf
    else:
        assert result.eta is None and result.error is None
    if result.status == "no_lower":
        assert result.lower is None and result.upper is not None
    if result.status == "no_upper":
        assert result.upper is None and result.lower is not None


class TestClosedForms:
    @both_methods
    @pytest.mark.parametrize("guess", [1e-7, 0.3, 0.5, 1.0, 40.0])
    @pytest.mark.parametrize("with_slope", [True, False])
    def test_quadratic(self, method: str, guess: float, with_slope: bool) -> None:
        slope, curvature = 2.0, 8.0
        result = find_critical_lr(
            quadratic(slope, curvature),
            loss=3.0,
            guess=guess,
            slope=slope if with_slope else None,
            method=method,
        )
        check(result, 3.0, TOLERANCES[method], 40)
        assert result.status == "found" and not result.non_monotone
        assert result.lower <= 0.5 <= result.upper
        error = 1 / 31 if method == "bisection" else 2e-3
        assert result.eta == pytest.approx(0.5, rel=error)

    @pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-6, 1e-12])
    @both_methods
    def test_tolerance(self, method: str, tolerance: float) -> None:
        result = find_critical_lr(
            quadratic(2.0, 8.0, loss=0.0),
            loss=0.0,
            guess=0.1,
            slope=2.0,
            tolerance=tolerance,
            method=method,
            max_evaluations=100,
        )
        check(result, 0.0, tolerance, 100)
        assert result.status == "found"
        assert result.lower <= 0.5 <= result.upper

    def test_gradient_descent_on_a_quadratic(self) -> None:
        """λ_c = λ_dir = Σ c_i²λ_i / Σ c_i² ≤ λ_max (Results 2.1 and 2.2)."""
        eigenvalues = [10.0, 3.0, 0.5, 0.01]
        gradient = [0.2, -1.0, 0.7, 2.0]
        theta = [c / eigenvalue for c, eigenvalue in zip(gradient, eigenvalues, strict=True)]

        def loss_at(eta: float) -> float:
            moved = [t - eta * c for t, c in zip(theta, gradient, strict=True)]
            return sum(e * m * m / 2 for e, m in zip(eigenvalues, moved, strict=True))

        loss, slope = loss_at(0.0), sum(c * c for c in gradient)
        sharpness = sum(c * c * e for c, e in zip(gradient, eigenvalues, strict=True)) / slope
        result = find_critical_lr(loss_at, loss=loss, guess=0.1, slope=slope, tolerance=1e-4)
        assert 2 / result.eta == pytest.approx(sharpness, rel=1e-6)
        assert 2 / result.eta <= max(eigenvalues)
        estimate = estimate_directional_sharpness(loss, slope, result.probes)
        assert estimate == pytest.approx(sharpness, rel=1e-9)

    @both_methods
    @pytest.mark.parametrize("eta_scale", [1e-30, 1e-6, 1e30])
    @pytest.mark.parametrize("loss_scale", [1e-30, 1.0, 1e30])
    def test_scales(self, method: str, eta_scale: float, loss_scale: float) -> None:
        result = find_critical_lr(
            lambda eta: loss_scale * (3 - eta / eta_scale + (eta / eta_scale) ** 2),
            loss=3 * loss_scale,
            guess=eta_scale / 5,
            slope=loss_scale / eta_scale,
            method=method,
        )
        assert result.status == "found"
        assert result.lower <= eta_scale <= result.upper


class TestBisection:
    """The paper's Algorithms 1 and 2, probe by probe, on L = η with the crossing at 1.3."""

    @staticmethod
    def probes(guess: float, **options: float) -> list[float]:
        result = find_critical_lr(
            lambda eta: eta, loss=1.3, guess=guess, slope=5.0, method="bisection", **options
        )
        assert result.eta == (result.lower + result.upper) / 2
        return [p.lr for p in result.probes]

    def test_doubles_then_bisects(self) -> None:
        assert self.probes(1.0) == [1, 2, 1.5, 1.25, 1.375, 1.3125]

    def test_halves_then_bisects(self) -> None:
        assert self.probes(5.0) == [5, 2.5, 1.25, 1.875, 1.5625, 1.40625, 1.328125]

    def test_tolerance_ends_it(self) -> None:
        assert self.probes(1.0, tolerance=0.5) == [1, 2]

    def test_warm_takes_five_or_six(self) -> None:
        counts = {
            find_critical_lr(
                lambda eta: eta, loss=1.0, guess=0.75 + k / 1000, method="bisection"
            ).evaluations
            for k in range(500)
        }
        assert counts <= {5, 6}

    def test_exponential_phase_is_bounded(self) -> None:
        up = find_critical_lr(lambda _: 0.0, loss=1.0, guess=1.0, method="bisection")
        assert [p.lr for p in up.probes] == [2.0**k for k in range(40)]
        down = find_critical_lr(
            lambda _: 2.0, loss=1.0, guess=1.0, method="bisection", max_evaluations=99
        )
        assert [p.lr for p in down.probes] == [2.0**-k for k in range(40)]
        assert (up.status, down.status) == ("no_upper", "no_lower")


class TestEndings:
    @both_methods
    @pytest.mark.parametrize("slope", [None, 1e-3, 1e3, math.nan])
    def test_no_upper(self, method: str, slope: float | None) -> None:
        result = find_critical_lr(lambda _: 0.5, loss=1.0, guess=2.0, slope=slope, method=method)
        check(result, 1.0, TOLERANCES[method], 40)
        assert result.status == "no_upper"
        if method == "bisection" or (slope is not None and math.isnan(slope)):
            assert result.lower >= 2.0**40
        else:  # no farther than where the slope alone promises a fall by a million times L(θ)
            assert 1e6 < (slope or 0.25) * result.lower < 2e7 and "promises" in result.reason
        assert method == "bisection" or result.evaluations <= 12

    @both_methods
    @pytest.mark.parametrize("slope", [None, 1e-3, 1e3, math.inf])
    def test_no_lower(self, method: str, slope: float | None) -> None:
        result = find_critical_lr(lambda _: 1.5, loss=1.0, guess=2.0, slope=slope, method=method)
        check(result, 1.0, TOLERANCES[method], 40)
        assert result.status == "no_lower"
        assert result.upper <= 2.0**-38
        if method == "certified":
            assert result.evaluations <= 12

    @both_methods
    @pytest.mark.parametrize("slope", [0.0, -0.3, -math.inf])
    def test_not_descent(self, method: str, slope: float) -> None:
        result = find_critical_lr(
            lambda eta: 1 + 0.3 * eta + eta**2, loss=1.0, guess=0.1, slope=slope, method=method
        )
        check(result, 1.0, TOLERANCES[method], 40)
        assert result.status == "not_descent" and not result.non_monotone
        if method == "certified":
            assert result.evaluations == 3
            assert result.upper == 0.1 / 2**12

    @both_methods
    @pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
    def test_non_finite(self, method: str, loss: float) -> None:
        def loss_at(_: float) -> float:
            raise AssertionError("nothing is to be evaluated")

        result = find_critical_lr(loss_at, loss=loss, guess=0.1, slope=1.0, method=method)
        nothing = SearchResult(None, None, None, None, 0, "non_finite", None, False, ())
        assert result == nothing

    @both_methods
    @pytest.mark.parametrize("evaluations", [1, 2])
    def test_exhausted(self, method: str, evaluations: int) -> None:
        result = find_critical_lr(
            quadratic(2.0, 8.0),
            loss=3.0,
            guess=1e-3,
            slope=2.0,
            method=method,
            max_evaluations=evaluations,
        )
        check(result, 3.0, 1 / 16, evaluations)
        assert result.status == "exhausted" and result.evaluations == evaluations

    @both_methods
    def test_exhausted_where_no_float_is_left(self, method: str) -> None:
        result = find_critical_lr(
            lambda eta: eta,
            loss=1.0,
            guess=0.9,
            tolerance=1e-17,
            method=method,
            max_evaluations=10_000,
        )
        assert result.status == "exhausted" and result.evaluations < 200
        assert (result.lower, result.upper) == (1.0, math.nextafter(1.0, 2))

    def test_result_is_json(self) -> None:
        result = find_critical_lr(quadratic(2.0, 8.0), loss=3.0, guess=0.4, slope=2.0)
        assert json.loads(json.dumps(dataclasses.asdict(result)))["status"] == "found"


class TestHostile:
    @both_methods
    @pytest.mark.parametrize("wall", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("guess", [0.2, 3.0, 1e5])
    def test_non_finite_probes_are_above(self, method: str, wall: float, guess: float) -> None:
        """A wall at 1 under the crossing of the quadratic at 2 is where the loss ends."""
        curve = quadratic(1.0, 1.0)
        result = find_critical_lr(
            lambda eta: curve(eta) if eta < 1 else wall,
            loss=3.0,
            guess=guess,
            slope=1.0,
            method=method,
        )
        check(result, 3.0, TOLERANCES[method], 40)
        assert result.status == "found"
        assert result.lower < 1 <= result.upper

    @both_methods
    def test_plateau_at_the_loss_is_below(self, method: str) -> None:
        result = find_critical_lr(
            lambda eta: 1.0 if eta < 7 else 1.1, loss=1.0, guess=0.5, slope=1.0, method=method
        )
        assert result.status == "found"
        assert result.lower < 7 <= result.upper

    @pytest.mark.parametrize(
        "slope", [math.nan, math.inf, -math.inf, -2.0, 0.0, 1e-9, 1e-3, 30.0, 1e4]
    )
    @pytest.mark.parametrize("guess", [1e-3, 0.45, 3.0])
    def test_wrong_slope_costs_evaluations_only(self, slope: float, guess: float) -> None:
        result = find_critical_lr(quadratic(2.0, 8.0), loss=3.0, guess=guess, slope=slope)
        check(result, 3.0, 1 / 4, 40)
        assert result.status == "found"
        assert result.lower <= 0.5 <= result.upper
        assert result.evaluations <= 20

    def test_smaller_crossing_is_sought(self) -> None:
        """Rises, falls below at 0.1 and rises at 1: the slope ≤ 0 makes it look nearer."""
        result = find_critical_lr(
            lambda eta: 1 + eta * (0.1 - eta) * (1 - eta), loss=1.0, guess=0.9, slope=-0.1
        )
        check(result, 1.0, 1 / 4, 40)
        assert result.non_monotone
        assert result.status == "not_descent"

    def test_smaller_crossing_is_found(self) -> None:
        """Below up to 1e-3, above to 0.1, below to 1: the first crossing is η_c."""
        result = find_critical_lr(
            lambda eta: 0.9 if eta < 1e-3 or 0.1 < eta < 1 else 1.1,
            loss=1.0,
            guess=0.9,
            slope=-1.0,
        )
        check(result, 1.0, 1 / 4, 40)
        assert result.status == "found" and result.non_monotone
        assert result.lower < 1e-3 <= result.upper

    @pytest.mark.parametrize("guess", [5e-324, 1e-310, 1.7e308])
    @both_methods
    def test_ends_of_the_floats(self, method: str, guess: float) -> None:
        for value in (0.0, 2.0):
            result = find_critical_lr(lambda _, v=value: v, loss=1.0, guess=guess, method=method)
            check(result, 1.0, TOLERANCES[method], 40)
            assert result.status == ("no_upper" if value == 0 else "no_lower")

    @pytest.mark.parametrize("power", [0.05, 0.5, 1.0])
    @pytest.mark.parametrize("guess", [1e-7, 1e-3, 1.0])
    def test_no_probe_is_far_out(self, power: float, guess: float) -> None:
        """At most where a quadratic loss ≥ 0 has crossed, or 12 times as far as the last one."""
        made, loss, slope = [guess], 3.0, 0.3

        def loss_at(eta: float) -> float:  # which bends so late that at first it seems not to
            made.append(eta)
            return loss - slope * eta * (1 - (eta / 100) ** power)

        result = find_critical_lr(loss_at, loss=loss, guess=guess, slope=slope)
        assert result.status == "found"
        for n in range(1, len(made)):
            assert made[n] <= 1.001 * max(4 * loss / slope, 12 * max(made[:n]))

    def test_worst_case_fits_the_default_evaluations(self) -> None:
        """An adversary that always leaves the larger part of the bracket, and misleads."""
        worst = 0
        for seed in range(3000):
            rng = random.Random(seed)
            ends = [-27.0, 27.0]

            def loss_at(eta: float, rng: random.Random = rng, ends: list[float] = ends) -> float:
                x = math.log(eta)
                above = x >= ends[1] or (x > ends[0] and x > sum(ends) / 2)
                if ends[0] < x < ends[1]:
                    ends[above] = x
                size = rng.choice((1e-12, eta, 10 ** rng.uniform(-12, 12))) * rng.random()
                return 2 + size if above and 2 + size > 2 else 3.0 if above else 2 - size

            slope = rng.choice((None, 1e-8, 10 ** rng.uniform(-12, -7)))
            result = find_critical_lr(loss_at, loss=2.0, guess=1.0, slope=slope)
            check(result, 2.0, 1 / 4, 40)
            # The slope that such losses suggest may promise anything.
            assert result.status == "found" or (slope is None and result.status == "no_upper")
            worst = max(worst, result.evaluations)
        assert worst < 40


finite = st.floats(allow_nan=False, allow_infinity=False)
any_loss = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0]), st.floats(-3, 3), finite
)


@st.composite
def searches(draw: st.DrawFn) -> tuple[Callable[[float], float], dict[str, object]]:
    """A hostile landscape and the arguments of a search on it."""
    guess = draw(
        st.one_of(
            st.floats(1e-3, 1e3),
            st.floats(-30, 30).map(lambda x: 10.0**x),
            st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        )
    )
    center = math.log(guess)
    loss = draw(st.one_of(st.sampled_from([0.0, 1.0, 3.0]), finite))
    kind = draw(st.sampled_from(["quadratic", "steps", "noise", "wild"]))
    slope = draw(st.one_of(st.none(), st.floats(), st.floats(1e-6, 1e6)))
    if kind == "quadratic":
        root = center + draw(st.floats(-35, 35))
        power, drop = draw(st.floats(0.05, 4)), draw(st.floats(1e-30, 1e30))

        def loss_at(eta: float) -> float:
            z = math.exp(min((math.log(eta) - root), 300.0))
            return loss + drop * z * (z**power - 1 if power * math.log(z or 1) < 300 else math.inf)
    elif kind == "steps":
        edges = sorted(draw(st.lists(st.floats(-30, 30), max_size=6)))
        values = draw(st.lists(any_loss, min_size=len(edges) + 1, max_size=len(edges) + 1))

        def loss_at(eta: float) -> float:
            x = math.log(eta) - center
            return values[sum(x > edge for edge in edges)]
    else:
        seed, wild = draw(st.integers(0, 10**6)), kind == "wild"

        def loss_at(eta: float) -> float:
            rng = random.Random(f"{seed} {eta!r}")
            if wild:
                return rng.choice((math.nan, math.inf, loss, rng.uniform(-1e300, 1e300)))
            return loss + rng.gauss(0, 1) * 1e-3

    options: dict[str, object] = {
        "loss": loss,
        "guess": guess,
        "slope": slope,
        "tolerance": draw(st.sampled_from([1 / 16, 1 / 4, 0.5, 0.99, 1e-3, 1e-12, 1e-17])),
        "method": draw(st.sampled_from(get_args(Method))),
        "max_evaluations": draw(st.sampled_from([1, 2, 3, 5, 40, 200])),
    }
    return loss_at, options


class TestProperties:
    @settings(max_examples=4000, deadline=None, derandomize=True)
    @given(searches())
    def test_every_result_keeps_its_promises(
        self, case: tuple[Callable[[float], float], dict[str, object]]
    ) -> None:
        loss_at, options = case
        calls = []

        def counted(eta: float) -> float:
            calls.append(eta)
            return loss_at(eta)

        result = find_critical_lr(counted, **options)
        check(result, options["loss"], options["tolerance"], options["max_evaluations"])
        assert calls == [p.lr for p in result.probes]
        assert repr(find_critical_lr(loss_at, **options)) == repr(result)

    @settings(max_examples=2000, deadline=None, derandomize=True)
    @given(
        distance=st.floats(-25, 25),
        power=st.floats(0.05, 4),
        wrong=st.one_of(st.none(), st.floats(-1e9, 1e-6), st.just(math.nan)),
        loss=st.floats(0, 100),
    )
    def test_single_crossing_is_found(
        self, distance: float, power: float, wrong: float | None, loss: float
    ) -> None:
        """y = (η/η_c)^p about a known crossing, with any slope given."""
        if wrong is not None and wrong <= 0:
            distance = max(distance, -8)  # below guess/2^12 a slope <= 0 is believed
        eta_c = math.exp(distance)

        loss = 0.0 if distance > 12 else loss  # where s·η_c would be over 10^6·L(θ)

        def rise(eta: float) -> float:
            return eta * ((eta / eta_c) ** power - 1)

        result = find_critical_lr(
            lambda eta: loss + math.copysign(max(abs(rise(eta)), 1e-9), rise(eta)),
            loss=loss,
            guess=1.0,
            slope=wrong,
        )
        check(result, loss, 1 / 4, 40)
        assert result.status == "found"
        assert result.lower * (1 - 1e-9) <= eta_c <= result.upper * (1 + 1e-9)


class TestCost:
    """Evaluations on y = (η/η_c)^p, p near 1, as in the stable phase of training."""

    @staticmethod
    def counts(guesses: tuple[float, float], slope: float | None) -> list[int]:
        rng = random.Random(0)
        counts = []
        for _ in range(600):
            power = rng.gauss(0.95, 0.1)
            guess = math.exp(rng.gauss(*guesses))
            result = find_critical_lr(
                lambda eta, power=power: 3 + 0.1 * eta * (eta**power - 1),
                loss=3.0,
                guess=guess,
                slope=slope and 0.1,
            )
            assert result.status == "found"
            counts.append(result.evaluations)
        return counts

    def test_warm_with_slope(self) -> None:
        counts = self.counts((0.0, 0.2), 0.1)
        assert statistics.fmean(counts) < 2.9
        assert max(counts) <= 4

    def test_cold_with_slope(self) -> None:
        counts = self.counts((-1.4, 0.3), 0.1)
        assert statistics.fmean(counts) < 3.8
        assert max(counts) <= 5

    def test_warm_without_slope(self) -> None:
        assert statistics.fmean(self.counts((0.0, 0.2), None)) < 3.9

    @pytest.mark.parametrize(("distance", "most"), [(1.2, 4.0), (300.0, 7.0)])
    def test_far_from_quadratic(self, distance: float, most: float) -> None:
        """Early in training y ≈ (η/η_c)^0.15 at sη_c = 5·L(θ), and y ∝ η next to θ."""
        counts = []
        knee = 0.01
        for k in range(200):
            power = 0.1 + k / 2000
            scale = 1 + knee ** (1 - power)

            def loss_at(eta: float, power: float = power, scale: float = scale) -> float:
                y = scale * eta / (eta ** (1 - power) + knee ** (1 - power))
                return 3 + 15 * eta * (y - 1)

            guess = 1 / distance / (1 + k / 1000)
            result = find_critical_lr(loss_at, loss=3.0, guess=guess, slope=15.0)
            assert result.status == "found"
            counts.append(result.evaluations)
        assert statistics.fmean(counts) < most

    def test_two_suffice_where_the_guess_is_within_the_tolerance(self) -> None:
        for guess in (0.48, 0.52):
            result = find_critical_lr(quadratic(0.2, 0.8), loss=3.0, guess=guess, slope=0.2)
            assert result.evaluations == 2

    def test_quadratic_at_its_minimum(self) -> None:
        """The exponent is a prior for language models; elsewhere it costs an evaluation or two."""
        for guess in (0.05, 0.2, 0.4, 0.9, 2.0):
            loss = quadratic(2.0, 8.0, loss=0.25)
            result = find_critical_lr(loss, loss=0.25, guess=guess, slope=2.0)
            assert result.status == "found" and result.evaluations <= 6


class TestArguments:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("guess", 0.0),
            ("guess", -1.0),
            ("guess", math.nan),
            ("guess", math.inf),
            ("tolerance", 0.0),
            ("tolerance", 1.0),
            ("tolerance", math.nan),
            ("method", "newton"),
            ("max_evaluations", 0),
            ("max_evaluations", 4.5),
        ],
    )
    def test_refused_by_name_and_value(self, name: str, value: object) -> None:
        arguments = {"loss": 1.0, "guess": 0.1, name: value}
        with pytest.raises(ValueError, match=f"{name}={value!r}.*pass"):
            find_critical_lr(lambda _: 0.0, **arguments)

    def test_probes_are_in_order(self) -> None:
        result = find_critical_lr(lambda eta: eta, loss=1.3, guess=0.01, method="bisection")
        rising = [a.lr < b.lr for a, b in pairwise(result.probes)]
        assert rising[:7] == [True] * 7
