"""Random landscapes by the hundred thousand, a third of them with noise."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

from megatron_sharpness.core.search import find_critical_lr

Rise = Callable[[float], float]


def power(rng: random.Random) -> Rise:
    p = rng.uniform(0.15, 2)
    return lambda t: t**p


def cubic(rng: random.Random) -> Rise:
    bend = rng.uniform(-0.45, 0.9)
    return lambda t: t * (1 + bend * (t - 1) / (1 if bend >= 0 else max(t, 1)))


def saturating(rng: random.Random) -> Rise:
    p, far = rng.uniform(0.3, 1), rng.uniform(1.5, 30)
    return lambda t: t**p if t < far else far**p + (1 - far / t) / 2


def wall(rng: random.Random) -> Rise:
    """Flat for η < η_c, and then the end of the loss."""
    return lambda t: 0.6 * t if t < 1 else math.inf


def plateau(rng: random.Random) -> Rise:
    """Falls at once, as in the first steps, and rises late: y is near 1 over decades."""
    knee, p = 10 ** rng.uniform(-4, -1), rng.uniform(0.02, 0.3)
    scale = 1 + knee ** (1 - p)
    return lambda t: scale * t / (t ** (1 - p) + knee ** (1 - p))


KINDS = (power, cubic, saturating, wall, plateau)


def test_no_bracket_is_invalid_and_no_found_is_far_off() -> None:
    """Counted 0 in 100,000 off by a factor of 2; allowed is 1 in 1,000."""
    count, off, statuses = 100_000, [], Counter[str]()
    for seed in range(count):
        rng = random.Random(seed)
        y, loss, critical = (
            rng.choice(KINDS)(rng),
            10 ** rng.uniform(-2, 1.2),
            10 ** rng.uniform(-6, 2),
        )
        slope = 10 ** rng.uniform(-3.5, 1.3) * loss / critical
        noise = slope * critical * 10 ** rng.uniform(-6, -1) if seed % 3 == 0 else 0.0
        walks = rng.random() < 0.5  # rounded weights: the noise grows up to some η
        near = rng.random() < 0.5

        def loss_at(eta: float) -> float:
            grown = min(1.0, math.sqrt(eta / critical * 10)) if walks else 1.0  # noqa: B023
            change = slope * eta * (y(eta / critical) - 1)  # noqa: B023
            return loss + change + noise * grown * rng.gauss(0, 1)  # noqa: B023

        start = loss + (0.0 if walks else noise * rng.gauss(0, 1))
        known = rng.choice([None, slope, slope, slope * 10 ** rng.uniform(-0.5, 0.5)])
        result = find_critical_lr(
            loss_at,
            loss=start,
            guess=critical * 10 ** (rng.gauss(0, 0.15) if near else rng.uniform(-7, 2)),
            slope=known,
            noise=noise,
        )
        statuses[result.status] += 1
        if result.status != "found":
            assert noise or result.status == "no_upper"
            continue
        lower, upper, eta = result.lower, result.upper, result.eta
        losses = {probe.lr: probe.loss for probe in result.probes}
        assert lower is not None and upper is not None and eta is not None
        assert 1 - lower / upper <= 1 / 4 and lower <= eta <= upper
        assert losses[lower] <= start < losses[upper] or losses[upper] == math.inf
        if abs(math.log(eta / critical)) > math.log(2):
            off.append((seed, eta / critical))
    assert len(off) < count / 1000, off
    assert statuses["found"] > 0.9 * count, statuses
    assert statuses["no_upper"] + statuses["no_lower"] + statuses["exhausted"] < count / 1000
