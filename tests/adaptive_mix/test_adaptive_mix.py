"""The order of a mix whose weights change, and what ``--adaptive-mix`` makes of measurements."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import pytest

from megatron_sharpness import arguments
from megatron_sharpness.adaptive_mix import adaptive, mixture
from megatron_sharpness.adaptive_mix.adaptive import AdaptiveMix, controller_of
from megatron_sharpness.adaptive_mix.mixture import Mixture, weights_at
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.measurement import Measurement, Scalars, Status


def test_the_fixed_components_keep_their_proportions() -> None:
    assert weights_at(0.2, [3, 1]) == pytest.approx([0.2, 0.6, 0.2])
    assert weights_at(1.0, [3, 1]) == [1.0, 0.0, 0.0]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "_BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
def test_samples_are_drawn_by_weight_and_none_of_a_component_twice() -> None:
    mix = Mixture([0.5, 0.2, 0.3], seed=1)
    drawn = [mix[n] for n in range(1000)]
    counts = Counter(component for component, _ in drawn)
    assert [counts[i] / 1000 for i in range(3)] == pytest.approx([0.5, 0.2, 0.3], abs=0.05)
    for component, count in counts.items():
        assert [n for c, n in drawn if c == component] == list(range(count))
    again = Mixture([0.5, 0.2, 0.3], seed=1)
    assert [again[n] for n in (700, 3, 64, 63)] == [drawn[n] for n in (700, 3, 64, 63)]
    assert drawn != [Mixture([0.5, 0.2, 0.3], seed=2)[n] for n in range(1000)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("at", [0, 1, 63, 64, 100, 300])
def test_weights_change_from_a_sample_on_and_a_resumed_mixture_goes_on(at: int) -> None:
    before = [Mixture([1.0, 1.0], seed=3)[n] for n in range(at)]
    mix = Mixture([1.0, 1.0], seed=3)
    assert mix[350]  # what was looked at does not matter
    mix.change(at, [0.0, 1.0])
    mix.change(400, [1.0, 0.0])
    drawn = [mix[n] for n in range(500)]
    assert drawn[:at] == before
    assert {component for component, _ in drawn[at:400]} == {1}
    assert {component for component, _ in drawn[400:]} == {0}
    assert [n for c, n in drawn if c == 1] == list(range(sum(c for c, _ in drawn)))
    resumed = Mixture([0.9, 0.1], seed=3)
    resumed.load_state_dict(mix.state_dict())
    assert [resumed[n] for n in range(450, 500)] == drawn[450:]
    assert resumed.weights == [1.0, 0.0]


def parse(flags: str) -> argparse.Namespace:
    parser = adaptive.add_arguments(arguments.add_arguments(argparse.ArgumentParser()))
    return parser.parse_args(flags.split())


EVERY = "--measure-critical-sharpness-every 10"
DATA = "--critical-sharpness-eval-data prose=a code=b"
MIX = f"{EVERY} {DATA} --adaptive-mix prose code"


class Log:
    """Notes what is written and said."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int | None, dict[str, float]]] = []
        self.said: list[str] = []

    def write(self, measurement: Scalars) -> None:
        self.written.append(
            (measurement.iteration, measurement.consumed_samples, measurement.scalars())
        )


def records(iteration: int, **found: float | Status) -> dict[str, Measurement]:
    """λ_c by name, or how the search ended."""
    return {
        name: Measurement(
            iteration, 8 * iteration, 0.1, name,
            status="found" if isinstance(value, float) else value,
            critical_sharpness=value if isinstance(value, float) else None,
        )
        for name, value in {"train": 1.0, **found}.items()
    }  # fmt: skip


def make(flags: str, weights: list[float], log: Log) -> AdaptiveMix:
    controller = controller_of(parse(flags), weights)
    return AdaptiveMix(controller, Mixture(weights, seed=1), [log], log.said.append)


def test_the_mixture_follows_the_controller_from_the_next_sample_on() -> None:
    log = Log()
    mix = make(f"{MIX} --adaptive-mix-every 2", [0.5, 0.3, 0.2], log)
    mix.observe(records(10, prose=4.0, code=1.0), 80)
    mix.observe(records(20, prose="not_descent", code=1.0), 160)
    mix.observe(records(30, prose=1.0, code="failed"), 240)
    mix.observe(records(40, prose=1.0, code="no_upper"), 320)
    assert mix.controller.share == pytest.approx(0.55)
    assert mix.mixture.changes == [
        (0, [0.5, 0.3, 0.2]), (160, pytest.approx([0.55, 0.27, 0.18])),
    ]  # fmt: skip
    tags = [(i, s, pytest.approx({"data-mix-share": r})) for i, s, r in
            ((10, 80, 0.5), (20, 160, 0.5), (30, 240, 0.55), (40, 320, 0.55))]  # fmt: skip
    assert log.written == tags
    assert log.said == [
        " data mix after iteration       20 | share of the first component: 0.5000 -> 0.5500 |"
    ]
    resumed = make(f"{MIX} --adaptive-mix-every 2", [0.5, 0.3, 0.2], Log())
    resumed.load_state_dict(mix.state_dict())
    for one in (mix, resumed):
        one.observe(records(50, prose=1.0, code=2.0), 400)
    assert resumed.state_dict() == mix.state_dict()
    assert resumed.controller.share < 0.55


@pytest.mark.parametrize(
    ("flags", "weights", "message"),
    [
        (f"{DATA} --adaptive-mix prose code", [1, 1], "give --measure-critical-sharpness-every"),
        (f"{MIX} --critical-sharpness-frozen 3", [1, 1], "trains nothing"),
        (f"{EVERY} --adaptive-mix prose code", [1, 1], "has no prose; it has nothing"),
        (f"{EVERY} {DATA} --adaptive-mix prose maths", [1, 1], "no maths; it has prose, code"),
        (f"{EVERY} {DATA} --adaptive-mix code code", [1, 1], "this is one loss; give two"),
        (MIX, [1], "no second component; give a mix"),
        (MIX, [1, 0], "no second component; give a mix"),
        (MIX, [0, 1], "--data-path 0.0: give one within its bounds, 0.05 and 0.95"),
        (f"{MIX} --adaptive-mix-bounds 0 1.5", [1, 1], "--adaptive-mix-bounds 1.5: a share"),
        (f"{MIX} --adaptive-mix-every 0", [1, 1], "--adaptive-mix-every 0: a number"),
        (f"{MIX} --adaptive-mix-rate -1", [1, 1], "--adaptive-mix-rate -1.0: a share"),
        (f"{MIX} --adaptive-mix-gain 0", [1, 1], "--adaptive-mix-gain 0.0: give a positive"),
    ],
)
def test_what_cannot_be_followed_is_refused(flags: str, weights: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        controller_of(parse(flags), weights)


def test_off_by_default() -> None:
    args: Any = parse(EVERY)
    assert args.adaptive_mix is None
