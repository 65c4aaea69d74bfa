"""What is said of the error is true, on losses that nothing was chosen on: logistic regression."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

import pytest

from megatron_sharpness.core.search import find_critical_lr


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def logistic(rng: random.Random) -> tuple[Callable[[float], float], float]:
    """A mean logistic loss along its own steepest descent, in three dimensions, and the slope."""
    examples = [[rng.gauss(0.3, 1.5) for _ in range(3)] for _ in range(rng.choice((8, 32)))]
    start = [rng.gauss(0, 1) for _ in range(3)]
    margins = [sum(x * w for x, w in zip(example, start, strict=True)) for example in examples]
    parts = [1 / (1 + math.exp(margin)) for margin in margins]
    gradient = [
        -statistics.fmean(part * example[i] for part, example in zip(parts, examples, strict=True))
        for i in range(3)
    ]
    along = [sum(x * g for x, g in zip(example, gradient, strict=True)) for example in examples]

    def loss_at(eta: float) -> float:
        pairs = zip(margins, along, strict=True)
        return statistics.fmean(softplus(eta * step - margin) for margin, step in pairs)

    return loss_at, sum(g * g for g in gradient)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("relative", [0.0, 1e-2])
def test_nine_of_ten_errors_are_within_twice_what_is_stated(known: bool, relative: float) -> None:
    errors, stated = [], []
    for seed in range(400):
        rng = random.Random(seed)
        exact, slope = logistic(rng)
        truth = find_critical_lr(exact, loss=exact(0.0), guess=1.0, slope=slope, tolerance=2**-20)
        if truth.eta is None:
            continue  # separable along the step: there is no η_c
        noise = relative * slope * truth.eta

        def noisy(eta: float) -> float:
            return exact(eta) + noise * rng.gauss(0, 1)  # noqa: B023

        result = find_critical_lr(
            noisy,
            loss=noisy(0.0),
            guess=truth.eta * math.exp(rng.gauss(0, 0.3)),
            slope=slope if known else None,
            noise=noise,
        )
        if result.eta is not None and result.error is not None:
            errors.append(abs(result.eta / truth.eta - 1))
            stated.append(result.error)
    assert len(errors) > 300
    within = sum(error <= 2 * told for error, told in zip(errors, stated, strict=True))
    assert within >= 0.9 * len(errors)
    # And what is stated is not ten times too large.
    assert statistics.median(stated) <= 10 * statistics.median(errors)


def test_weights_that_do_not_follow_a_short_line_are_half_a_step_off() -> None:
    def quadratic(eta: float) -> float:
        return 3.0 - 2.0 * eta * (1 - eta / 0.05)

    sure, unsure = (
        find_critical_lr(quadratic, loss=3.0, guess=0.05, slope=2.0, resolution=resolution)
        for resolution in (0.0, 0.01)
    )
    assert sure.error is not None and unsure.error is not None and unsure.eta is not None
    assert unsure.error == pytest.approx(math.hypot(sure.error, 0.01 / 4 / unsure.eta))


@pytest.mark.parametrize("excess", [1e-1, 1e-3])
def test_a_batch_that_is_memorized(excess: float) -> None:
    """Its loss is next to 0, falls to a part of that, and grows exponentially farther out."""
    errors, stated = [], []
    for seed in range(100):
        rng = random.Random(seed)
        slope, rate, critical = rng.uniform(5, 10), rng.uniform(8, 16), 10 ** rng.uniform(-3, 0)
        rise = excess * (1 - math.exp(-slope)) / math.expm1(rate)

        def loss_at(eta: float) -> float:
            t = eta / critical  # noqa: B023
            return excess * math.exp(-slope * t) + rise * math.expm1(rate * t)  # noqa: B023

        result = find_critical_lr(
            loss_at,
            loss=excess,
            guess=critical * math.exp(rng.gauss(0, 0.3)),
            slope=(excess * slope - rise * rate) / critical,
        )
        assert result.eta is not None and result.error is not None
        assert result.lower is not None and result.upper is not None
        assert result.error <= (result.upper / result.lower - 1) / math.sqrt(12)
        errors.append(abs(result.eta / critical - 1))
        stated.append(result.error)
    within = sum(error <= 2 * told for error, told in zip(errors, stated, strict=True))
    assert within >= 0.9 * len(errors)
    assert statistics.median(stated) <= 10 * statistics.median(errors)
