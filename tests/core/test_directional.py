from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from megatron_sharpness.core.directional import estimate_directional_sharpness
from megatron_sharpness.core.search import Probe


def quadratic(slope: float, curvature: float, loss: float = 3.0) -> Callable[[float], float]:
    return lambda eta: loss - eta * slope + eta**2 * curvature / 2


def cubic(eta: float) -> float:
    return 3 - 0.5 * eta + 3 * eta**2 - eta**3


def test_exact_on_a_quadratic_from_any_probe() -> None:
    line = quadratic(0.5, 6.0)
    for eta in (1e-2, 0.1, 1.0, 50.0):
        estimate = estimate_directional_sharpness(3.0, 0.5, [Probe(eta, line(eta))])
        assert estimate == pytest.approx(12.0, rel=1e-6)


def test_takes_the_nearest_probe_that_stands_out_from_the_noise() -> None:
    probes = [Probe(eta, cubic(eta)) for eta in (0.2, 1e-7, 0.01, math.inf, 0.1)]
    probes.append(Probe(1e-3, math.nan))
    estimate = estimate_directional_sharpness(3.0, 0.5, probes, noise=1e-7)
    assert estimate == pytest.approx(12 - 0.01 * 4, rel=1e-6)
    coarse = estimate_directional_sharpness(3.0, 0.5, probes, noise=1e-4)
    assert coarse == pytest.approx(12 - 0.1 * 4, rel=1e-6)
    blind = estimate_directional_sharpness(3.0, 0.5, probes, resolution=0.15)
    assert blind == pytest.approx(12 - 0.2 * 4, rel=1e-6)


@pytest.mark.parametrize(("loss", "used"), [(6.0, 1e-4), (1e-3, 0.22)])
def test_far_from_quadratic_it_is_of_the_probe_at_the_scale_of_the_critical_rate(
    loss: float, used: float
) -> None:
    """y = (η/η_c)^0.15: 2y/η is 9.2 to 6400 at these probes, beside λ_c = 10."""
    probes = [Probe(eta, loss + eta * ((eta / 0.2) ** 0.15 - 1)) for eta in (1e-4, 0.17, 0.22)]
    estimate = estimate_directional_sharpness(loss, 1.0, probes, critical_lr=0.2)
    assert estimate == pytest.approx(2 * (used / 0.2) ** 0.15 / used, rel=1e-6)


@pytest.mark.parametrize("slope", [None, 0.0, -1.0, math.nan, math.inf])
def test_none_without_a_descent_slope(slope: float | None) -> None:
    assert estimate_directional_sharpness(1.0, slope, [Probe(1.0, 2.0)]) is None


def test_none_without_a_usable_probe() -> None:
    assert estimate_directional_sharpness(1.0, 1.0, []) is None
    assert estimate_directional_sharpness(1.0, 1.0, [Probe(1.0, math.nan)]) is None
    flat = [Probe(1e-9, 1 - 1e-9)]
    assert estimate_directional_sharpness(1.0, 1.0, flat, noise=1e-12) is None
