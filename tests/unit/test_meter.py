from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from megatron_sharpness.measurement import Measurement
from megatron_sharpness.meter import Meter, MeterState, ProbeError, Settings, Step

SLOPE, CURVATURE, START = 2.0, 40.0, 3.0
CRITICAL = 2.0 * SLOPE / CURVATURE
STEP = Step(
    iteration=10, consumed_samples=80, lr=0.03, weight_decay=0.1, beta1=0.9, training_loss=START,
    slope=SLOPE, update_norm=1.5, tokens=256,
)  # fmt: skip


def quadratic(eta: float) -> float:
    return START - SLOPE * eta + 0.5 * CURVATURE * eta * eta


class Records(list[Measurement]):
    def write(self, measurement: Measurement) -> None:
        self.append(measurement)


def counted(function: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    calls: list[float] = []

    def call(eta: float) -> float:
        calls.append(eta)
        return function(eta)

    return call, calls


def test_quadratic_gives_every_number_of_the_record() -> None:
    records = Records()
    record = Meter(Settings(), sinks=[records]).measure(STEP, quadratic)
    assert records == [record]
    assert record.status == "found"
    assert record.critical_lr == pytest.approx(CRITICAL, rel=1e-3)
    assert record.critical_sharpness == pytest.approx(CURVATURE / SLOPE, rel=1e-3)
    # On a quadratic λ_dir = λ_c (Result 2.1).
    assert record.directional_sharpness == pytest.approx(CURVATURE / SLOPE, rel=1e-6)
    assert record.critical_lr_lower is not None and record.critical_lr_upper is not None
    assert record.critical_lr_lower <= CRITICAL < record.critical_lr_upper
    assert record.lr_over_critical == pytest.approx(0.03 / CRITICAL, rel=1e-3)
    assert record.edge_of_stability == pytest.approx(2 / 0.03 - 0.1)
    assert record.edge_of_stability_preconditioned == pytest.approx((2 / 0.03 - 0.1) * 19)
    assert (record.loss, record.slope, record.tokens) == (START, SLOPE, 256)
    assert record.seconds > 0.0


def test_the_self_test_is_made_once_and_then_the_loss_is_free() -> None:
    meter = Meter(Settings())
    for expected in (1, 0, 0):
        loss_at, calls = counted(quadratic)
        record = meter.measure(STEP, loss_at)
        assert calls.count(0.0) == expected
        assert len(calls) == record.evaluations + 3 * expected  # L(θ) and two probes of the noise
    assert meter.state.replay_is_exact is True
    assert meter.state.noise == pytest.approx(0.0, abs=1e-6)


def test_a_failing_self_test_is_reported_and_the_loss_is_evaluated_from_then_on() -> None:
    warnings: list[str] = []
    meter = Meter(Settings(), warn=warnings.append)
    step = replace(STEP, training_loss=START + 1e-3)
    for _ in range(3):
        loss_at, calls = counted(quadratic)
        record = meter.measure(step, loss_at)
        assert calls.count(0.0) == 1
        assert record.loss == START
    assert meter.state.replay_is_exact is False
    assert len(warnings) == 1 and "differs from the training loss" in warnings[0]


def test_searches_start_where_the_last_one_ended() -> None:
    meter = Meter(Settings(initial_guess=1e-3))
    _, cold = meter.measure(STEP, quadratic), meter.state.guess
    assert cold == pytest.approx(CRITICAL, rel=1e-3)
    loss_at, calls = counted(quadratic)
    meter.measure(STEP, loss_at)
    assert len(calls) <= 3 and all(CRITICAL / 1.2 < eta < CRITICAL * 1.2 for eta in calls)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"skipped": True}, "skipped_step"),
        ({"lr": 0.0}, "zero_lr"),
        ({"failed": "rank 1: no memory"}, "failed"),
    ],
)
def test_steps_that_cannot_be_measured_make_no_probe(
    change: dict[str, object], status: str
) -> None:
    loss_at, calls = counted(quadratic)
    record = Meter(Settings()).measure(replace(STEP, **change), loss_at)  # type: ignore[arg-type]
    assert record.status == status
    assert calls == []
    assert record.critical_sharpness is None


def test_a_non_finite_loss_is_a_status() -> None:
    record = Meter(Settings()).measure(replace(STEP, training_loss=math.nan), lambda eta: math.nan)
    assert record.status == "non_finite"
    assert record.critical_lr is None


def test_an_error_costs_the_measurement_and_not_the_run() -> None:
    def broken(eta: float) -> float:
        raise ProbeError("rank 1: OutOfMemoryError")

    meter = Meter(Settings())
    record = meter.measure(STEP, broken)
    assert record.status == "failed" and "rank 1: OutOfMemoryError" in str(record.reason)
    assert meter.measure(STEP, quadratic).status == "found"


def test_an_error_can_be_made_fatal_and_is_recorded_first() -> None:
    def broken(eta: float) -> float:
        raise ProbeError("rank 1: OutOfMemoryError")

    records = Records()
    with pytest.raises(ProbeError, match="OutOfMemoryError"):
        Meter(Settings(on_error="raise"), sinks=[records]).measure(STEP, broken)
    assert [record.status for record in records] == ["failed"]


def test_noise_that_hides_the_root_is_a_status() -> None:
    def noisy(eta: float) -> float:
        return quadratic(eta) + (0.02 if 0.0 < eta < 0.01 * STEP.lr else 0.0)

    meter = Meter(Settings())
    record = meter.measure(STEP, noisy)
    assert record.noise == pytest.approx(0.02, rel=1e-2)  # a tenth of s·η_c = 0.2
    assert record.status == "noise_limited" and "10%" in str(record.reason)
    assert record.critical_sharpness is None and record.critical_lr is None
    assert record.critical_lr_lower is not None  # what was seen is kept, and not gone on from
    assert meter.state.guess is None


def test_a_sink_that_fails_is_reported_and_the_others_are_written() -> None:
    class Full:
        def write(self, measurement: Measurement) -> None:
            raise OSError("no space left on device")

    warnings: list[str] = []
    records = Records()
    Meter(Settings(), sinks=[Full(), records], warn=warnings.append).measure(STEP, quadratic)
    assert len(records) == 1
    assert len(warnings) == 1 and "no space left" in warnings[0]


def test_state_goes_through_a_checkpoint() -> None:
    meter = Meter(Settings())
    meter.measure(STEP, quadratic)
    resumed = Meter(Settings())
    resumed.load_state_dict({**meter.state_dict(), "of a later version": 1})
    one, other = meter.measure(STEP, quadratic), resumed.measure(STEP, quadratic)
    assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
    Meter(Settings()).load_state_dict({})  # a checkpoint without any


def test_due_counts_from_one() -> None:
    settings = Settings(every=3)
    assert [i for i in range(1, 10) if settings.due(i)] == [3, 6, 9]


def test_a_part_of_the_batch_says_where_to_begin() -> None:
    changes, parts = counted(lambda eta: 0.9 * (quadratic(eta) - START))
    loss_at, calls = counted(quadratic)
    meter = Meter(Settings(), state=MeterState(guess=CRITICAL / 2, replay_is_exact=True, noise=0.0))
    record = meter.measure(STEP, loss_at, changes)
    assert parts == [CRITICAL / 2]
    assert calls[0] == pytest.approx(CRITICAL, rel=0.1)
    assert record.status == "found" and record.evaluations == len(calls)


@pytest.mark.parametrize("change", [math.nan, math.inf, -1e9])
def test_a_part_that_says_nothing_leaves_the_guess(change: float) -> None:
    loss_at, calls = counted(quadratic)
    meter = Meter(Settings(), state=MeterState(guess=CRITICAL / 2, replay_is_exact=True, noise=0.0))
    record = meter.measure(STEP, loss_at, lambda eta: change)
    assert calls[0] == CRITICAL / 2 and record.status == "found"


def test_an_estimate_states_its_error_and_is_where_the_next_search_begins() -> None:
    meter = Meter(Settings(method="point"))
    record = meter.measure(STEP, quadratic)
    assert record.status == "estimated"
    assert record.critical_lr_error is not None and 0 < record.critical_lr_error < 1 / 16
    assert record.critical_lr == pytest.approx(CRITICAL, rel=2 * record.critical_lr_error)
    assert record.critical_sharpness == 2 / record.critical_lr
    assert meter.state.guess == record.critical_lr


def others(
    functions: dict[str, Callable[[float], float]],
) -> Callable[[float, Sequence[str]], dict[str, tuple[float, int]]]:
    return lambda eta, names: {name: (functions[name](eta), 64) for name in names}


def test_losses_on_other_data_have_records_of_their_own() -> None:
    records = Records()
    meter = Meter(Settings(), sinks=[records])
    meter.measure(STEP, quadratic)
    found = meter.measure_others(
        STEP,
        ["code", "steep"],
        others({"code": lambda eta: 5.0 - eta + 3.0 * eta * eta, "steep": lambda eta: 5.0 + eta}),
    )
    assert records[1:] == [found["code"], found["steep"]]
    code, steep = found["code"], found["steep"]
    assert (code.batch, code.status, code.tokens, code.loss) == ("code", "found", 64, 5.0)
    assert code.critical_lr == pytest.approx(1 / 3, rel=1e-6)
    assert code.lr_over_critical == pytest.approx(0.09, rel=1e-6)
    assert code.slope is None and code.update_norm == STEP.update_norm
    assert (steep.status, steep.critical_lr) == ("not_descent", None)
    assert meter.state.guesses == {"code": code.critical_lr}
    assert meter.state.guess == records[0].critical_lr
    assert code.scalars().keys() == {
        "critical-sharpness/code", "critical-learning-rate/code",
        "learning-rate-over-critical/code",
    }  # fmt: skip


def test_a_loss_on_other_data_that_falls_by_less_than_its_noise_is_noise_limited() -> None:
    meter = Meter(Settings(), state=MeterState(noise=1e-3))
    shallow = others({"code": lambda eta: 5.0 - 0.1 * eta + 0.5 * eta * eta})  # s·η_c = 0.02
    deep = others({"code": lambda eta: 5.0 - eta + 5.0 * eta * eta})  # s·η_c = 0.2
    assert meter.measure_others(STEP, ["code"], shallow)["code"].status == "noise_limited"
    assert meter.measure_others(STEP, ["code"], deep)["code"].status == "found"


def test_rounding_next_to_theta_is_no_descent() -> None:
    """The slope is 0, and what is left to fall is the rounding of the loss."""
    meter = Meter(Settings(), state=MeterState(noise=1e-7))
    flat = others({"code": lambda eta: round(5.0 + 30 * eta * eta, 7)})
    assert meter.measure_others(STEP, ["code"], flat)["code"].status == "noise_limited"


def test_steps_that_cannot_be_measured_make_no_probe_of_other_data() -> None:
    def never(eta: float, names: Sequence[str]) -> dict[str, tuple[float, int]]:
        raise AssertionError

    for changed, status in (({"skipped": True}, "skipped_step"), ({"lr": 0.0}, "zero_lr")):
        found = Meter(Settings()).measure_others(replace(STEP, **changed), ["code"], never)  # type: ignore[arg-type]
        assert found["code"].status == status
