from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from megatron_sharpness.core.errors import ProbeError
from megatron_sharpness.core.measurement import Measurement, Records
from megatron_sharpness.core.meter import Meter
from megatron_sharpness.core.self_test import SelfTest
from megatron_sharpness.core.settings import Settings
from megatron_sharpness.core.step import LossAt, LossesAt, Step

SLOPE, CURVATURE, START = 2.0, 40.0, 3.0
CRITICAL = 2.0 * SLOPE / CURVATURE
STEP = Step(
    iteration=10, consumed_samples=80, lr=0.03, weight_decay=0.1, beta1=0.9, training_loss=START,
    slope=SLOPE, update_norm=1.5,
)  # fmt: skip
UNKNOWN = replace(STEP, training_loss=None)
TOKENS = 256


def quadratic(eta: float) -> float:
    return START - SLOPE * eta + 0.5 * CURVATURE * eta * eta


class Written(list[Measurement]):
    def write(self, measurement: Measurement) -> None:
        self.append(measurement)


def counted(function: Callable[[float], float]) -> tuple[LossAt, list[float]]:
    calls: list[float] = []

    def call(eta: float) -> tuple[float, int]:
        calls.append(eta)
        return function(eta), TOKENS

    return call, calls


def measure(
    meter: Meter, function: Callable[[float], float] = quadratic, step: Step = STEP
) -> Measurement:
    """Measure and write."""
    return meter.write(meter.measure(step, counted(function)[0])).train


def meter_past_its_test(**state: object) -> Meter:
    """A meter in a run whose first measurement is over."""
    known: dict[str, object] = {
        "replay_error": 0.0, "repeat_errors": {"train": 0.0}, "slope_agrees": True
    }  # fmt: skip
    meter = Meter(Settings())
    meter.load_state_dict({**known, **state})
    return meter


def test_quadratic_gives_every_number_of_the_record() -> None:
    records = Written()
    record = measure(Meter(Settings(), sinks=[records]))
    assert records == [record]
    assert record.status == "found"
    assert record.critical_lr == pytest.approx(CRITICAL, rel=1e-6)
    assert record.critical_sharpness == pytest.approx(CURVATURE / SLOPE, rel=1e-6)
    assert record.critical_lr_error is not None and 0 < record.critical_lr_error < 0.01
    # On a quadratic λ_dir = λ_c (Result 2.1).
    assert record.directional_sharpness == pytest.approx(CURVATURE / SLOPE, rel=1e-6)
    assert record.critical_lr_lower is not None and record.critical_lr_upper is not None
    assert record.critical_lr_lower <= CRITICAL < record.critical_lr_upper
    assert record.lr_over_critical == pytest.approx(0.03 / CRITICAL, rel=1e-6)
    assert record.edge_of_stability == pytest.approx(2 / 0.03 - 0.1)
    assert record.edge_of_stability_preconditioned == pytest.approx((2 / 0.03 - 0.1) * 19)
    assert (record.loss, record.slope, record.tokens) == (START, SLOPE, TOKENS)
    assert record.replay_error == 0.0 and record.noise == pytest.approx(START * 2**-22)
    assert record.seconds > 0.0 and record.reason is None


def test_the_self_test_is_made_once_and_then_the_loss_is_free() -> None:
    """Two passes more: L(θ), and one next to θ where the loss is to fall as the slope says."""
    meter = Meter(Settings())
    for more in (2, 0, 0):
        loss_at, calls = counted(quadratic)
        record = meter.measure(STEP, loss_at).train
        assert calls.count(0.0) == (1 if more else 0)
        assert len(calls) == record.evaluations + more
    assert meter.guesses == {"train": record.critical_lr}
    assert meter.test == SelfTest(repeat_errors={"train": 0.0}, replay_error=0.0, slope_agrees=True)


def test_without_the_training_loss_it_is_evaluated_twice_at_first_and_then_once() -> None:
    meter = Meter(Settings())
    for expected in (2, 1, 1):
        loss_at, calls = counted(quadratic)
        record = meter.measure(UNKNOWN, loss_at).train
        assert calls.count(0.0) == expected
        assert (record.loss, record.replay_error, record.tokens) == (START, None, TOKENS)


def test_from_the_first_measurement_on_the_training_loss_is_the_loss_at_the_start() -> None:
    """Where its replay equals it but for the order of the sum, as in the records that follow."""
    step = replace(STEP, training_loss=START * (1 + 1e-6))
    meter = Meter(Settings())
    first, second = measure(meter, step=step), measure(meter, step=step)
    assert first.loss == second.loss == step.training_loss
    assert first.replay_error == pytest.approx(START * 1e-6)


def test_a_replay_that_is_not_exact_is_reported_and_evaluated_from_then_on() -> None:
    warnings: list[str] = []
    meter = Meter(Settings(), warn=warnings.append)
    step = replace(STEP, training_loss=START + 1e-3)
    for expected in (2, 1, 1):
        loss_at, calls = counted(quadratic)
        record = meter.measure(step, loss_at).train
        assert calls.count(0.0) == expected
        assert record.status == "found" and record.loss == START
        assert record.replay_error == pytest.approx(1e-3)
    assert len(warnings) == 1 and "differs from the training loss" in warnings[0]


class TestWrongLosses:
    """Each was of status found once, with a wrong number."""

    MEAN = staticmethod(lambda eta: quadratic(eta) / TOKENS)
    OTHER = staticmethod(lambda eta: 1.1 * START - 0.3 * SLOPE * eta + 0.5 * CURVATURE * eta**2)
    STILL = staticmethod(lambda eta: START)

    @pytest.mark.parametrize("wrong", [MEAN, OTHER])
    def test_a_mean_or_another_loss_is_not_the_trained_one(self, wrong: LossAt) -> None:
        meter = Meter(Settings())
        for _ in range(2):  # it is not believed later either
            record = measure(meter, wrong)  # type: ignore[arg-type]
            assert record.status == "failed" and "the step was trained on 3" in str(record.reason)
            assert record.critical_lr is None and record.critical_lr_lower is None
        assert meter.guesses == {}
        assert measure(meter).status == "found"

    @pytest.mark.parametrize("wrong", [MEAN, OTHER, STILL])
    def test_one_is_told_by_the_slope_where_the_training_loss_is_not_known(
        self, wrong: LossAt
    ) -> None:
        meter = Meter(Settings())
        for _ in range(2):
            record = measure(meter, wrong, UNKNOWN)  # type: ignore[arg-type]
            assert record.status == "failed"
            reasons = ("as fast as its gradient", "wherever along the update")
            assert any(reason in str(record.reason) for reason in reasons)
            assert record.critical_lr is None and record.directional_sharpness is None
        assert measure(meter, step=UNKNOWN).status == "found"

    @pytest.mark.parametrize("step", [STEP, UNKNOWN])
    def test_another_batch_at_each_call_does_not_repeat(self, step: Step) -> None:
        batches = itertools.cycle([0.02, -0.03, 0.01, -0.02])
        record = measure(Meter(Settings()), lambda eta: quadratic(eta) + next(batches), step)
        assert record.status == "failed" and "does not repeat" in str(record.reason)

    def test_weights_that_the_model_does_not_read_are_told_though_the_loss_is_right(self) -> None:
        record = measure(Meter(Settings()), self.STILL)
        assert record.status == "failed" and "the model does not read" in str(record.reason)

    def test_they_can_be_made_fatal(self) -> None:
        with pytest.raises(ProbeError, match="trained on 3"):
            measure(Meter(Settings(on_error="raise")), self.MEAN)


@pytest.mark.parametrize("factor", [0.19, 3.0])
def test_a_slope_of_another_loss_is_left_out_where_the_loss_is_known_to_be_right(
    factor: float,
) -> None:
    warnings: list[str] = []
    meter = Meter(Settings(), warn=warnings.append)
    for _ in range(2):
        record = measure(meter, step=replace(STEP, slope=factor * SLOPE))
        assert record.status == "found"
        assert record.critical_lr == pytest.approx(CRITICAL, rel=0.03)
        assert record.slope is None and record.directional_sharpness is None
    assert len(warnings) == 1 and "clipped" in warnings[0]


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_in_evaluation_mode_the_slope_is_of_a_similar_loss(factor: float) -> None:
    """It is that of training, and nobody need be told, within reason."""
    warnings: list[str] = []
    step = replace(UNKNOWN, slope=factor * SLOPE, trained=False)
    record = measure(Meter(Settings(), warn=warnings.append), step=step)
    assert record.status == "found" and record.slope is None and warnings == []
    other = replace(step, slope=SLOPE * factor**4)
    assert measure(Meter(Settings()), step=other).status == "failed"


def test_searches_start_where_the_last_one_ended() -> None:
    meter = Meter(Settings(initial_guess=1e-3))
    measure(meter)
    assert meter.guesses["train"] == pytest.approx(CRITICAL, rel=1e-6)
    loss_at, calls = counted(quadratic)
    meter.measure(STEP, loss_at)
    assert len(calls) == 3 and all(CRITICAL / 1.34 < eta < CRITICAL * 1.34 for eta in calls)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"skipped": "an overflow"}, "skipped_step"),
        ({"lr": 0.0}, "zero_lr"),
        ({"failed": "rank 1: no memory"}, "failed"),
    ],
)
def test_steps_that_cannot_be_measured_make_no_probe(
    change: dict[str, object], status: str
) -> None:
    loss_at, calls = counted(quadratic)
    step = replace(STEP, **change)  # type: ignore[arg-type]
    record = Meter(Settings()).measure(step, loss_at).train
    assert record.status == status
    assert record.reason == (change.get("skipped") or change.get("failed"))
    assert calls == []
    assert record.critical_sharpness is None


@pytest.mark.parametrize("trained", [math.nan, None])
def test_a_non_finite_loss_is_a_status(trained: float | None) -> None:
    record = measure(Meter(Settings()), lambda eta: math.nan, replace(STEP, training_loss=trained))
    assert record.status == "non_finite"
    assert record.critical_lr is None


def test_an_error_costs_the_measurement_and_not_the_run() -> None:
    def broken(eta: float) -> float:
        raise ProbeError("rank 1: OutOfMemoryError")

    meter = Meter(Settings())
    record = measure(meter, broken)
    assert record.status == "failed" and "rank 1: OutOfMemoryError" in str(record.reason)
    assert measure(meter).status == "found"


def test_an_error_can_be_made_fatal_and_is_recorded_first() -> None:
    def broken(eta: float) -> float:
        raise ProbeError("rank 1: OutOfMemoryError")

    records = Written()
    with pytest.raises(ProbeError, match="OutOfMemoryError"):
        measure(Meter(Settings(on_error="raise"), sinks=[records]), broken)
    assert [record.status for record in records] == ["failed"]


def test_the_noise_is_of_weights_kernels_and_fp32_and_each_has_its_remedy() -> None:
    step = replace(STEP, noise=0.02)  # a tenth of s·η_c = 0.2
    record = measure(meter_past_its_test(), step=step)
    assert record.noise == pytest.approx(0.02, rel=1e-6)
    assert record.status == "noise_limited" and "16 bits" in str(record.reason)
    assert record.critical_sharpness is None and record.critical_lr is None
    record = measure(meter := meter_past_its_test(repeat_errors={"train": 0.03}), step=step)
    assert record.noise == pytest.approx(math.hypot(0.02, 0.03), rel=1e-6)
    assert "evaluating it again" in str(record.reason) and "more tokens" in str(record.reason)
    assert meter.guesses == {}
    narrow = Meter(Settings(tolerance=1e-4))
    narrow.load_state_dict(meter_past_its_test().state_dict())
    record = measure(narrow, step=replace(STEP, noise=1e-3))
    assert record.status == "noise_limited" and "wider tolerance" in str(record.reason)
    assert record.critical_lr_lower is not None  # what was seen is kept


def test_a_learning_rate_within_the_noise_is_not_where_the_search_starts() -> None:
    step = replace(STEP, lr=1e-9, noise=1e-5, resolution=2e-3)
    loss_at, calls = counted(quadratic)
    record = meter_past_its_test().measure(step, loss_at).train
    assert calls[0] == 2e-3 and record.status == "found" and record.evaluations <= 6
    assert record.critical_lr == pytest.approx(CRITICAL, rel=0.01)
    # Nothing is compared with the slope below the resolution, and nothing read off there.
    again = meter_past_its_test(slope_agrees=None)
    again.measure(replace(step, resolution=CRITICAL / 10), loss_at)
    assert again.test.slope_agrees is None


def test_a_sink_that_fails_is_reported_and_the_others_are_written() -> None:
    class Full:
        def write(self, measurement: Measurement) -> None:
            raise OSError("no space left on device")

    warnings: list[str] = []
    records = Written()
    meter = Meter(Settings(), sinks=[Full(), Full(), records], warn=warnings.append)
    for _ in range(3):
        measure(meter)
    assert len(records) == 3
    # Each once, in one line.
    assert len(warnings) == 2 and "Full could not write" in warnings[0]
    assert "OSError: no space left" in warnings[0] and "\n" not in warnings[0]


def test_what_a_watch_has_found_ends_the_measurements_with_that_reason() -> None:
    records = Written()
    meter = Meter(Settings(), sinks=[records])
    assert meter.watches
    found = measure(meter)
    assert found.status == "found" and meter.watches  # it was not watched
    changed = ["model.cache", *(f"name {i}" for i in range(9))]
    record = meter.write(Records([found]), changed).train
    assert record.status == "failed" and record.critical_lr is None
    assert "model.cache, name 0" in str(record.reason) and "and 2 more" in str(record.reason)
    loss_at, calls = counted(quadratic)
    again = meter.measure(STEP, loss_at).train
    assert again.reason == record.reason and calls == [] and not meter.watches
    assert records == [found, record]


def test_a_loss_that_does_not_repeat_is_not_tried_again() -> None:
    """Each time it might change what training reads."""
    numbers = itertools.count()
    meter = Meter(Settings())
    first = measure(meter, lambda eta: START + next(numbers), UNKNOWN)
    made = next(numbers)
    again = measure(meter, lambda eta: START + next(numbers), UNKNOWN)
    assert first.status == again.status == "failed" and again.reason == first.reason
    assert "No further step of this run" in str(first.reason) and next(numbers) == made + 1


def test_the_first_measurement_is_watched_or_each() -> None:
    first, always = Meter(Settings()), Meter(Settings(watch="always"))
    first.write(first.measure(replace(STEP, lr=0.0), counted(quadratic)[0]), [])
    assert first.watches  # without a probe that was none
    for meter in (first, always):
        meter.write(meter.measure(STEP, counted(quadratic)[0]), [])
    assert not first.watches and always.watches


def test_what_a_watch_has_found_can_be_made_fatal() -> None:
    meter = Meter(Settings(on_error="raise"))
    with pytest.raises(ProbeError, match=r"model\.cache"):
        meter.write(Records([measure(meter)]), ["model.cache"])


def test_a_loss_that_is_the_same_everywhere_says_what_the_model_does_not_read() -> None:
    for step in (STEP, UNKNOWN, replace(UNKNOWN, slope=None)):
        record = measure(Meter(Settings()), lambda eta: START, step)
        assert record.status == "failed" and "wherever along" in str(record.reason)
    # A loss that falls to a constant, such as 0, is another thing.
    fallen = measure(Meter(Settings()), lambda eta: 0.0 if eta else START, UNKNOWN)
    assert "wherever along" not in str(fallen.reason)
    # Within the noise that is no news.
    hidden = replace(STEP, noise=1e6, lr=1e-6)
    assert measure(meter_past_its_test(), lambda eta: START, hidden).status != "failed"


def test_state_goes_through_a_checkpoint() -> None:
    meter = Meter(Settings())
    measure(meter)
    resumed = Meter(Settings())
    resumed.load_state_dict({**meter.state_dict(), "of a later version": 1})
    one, other = measure(meter), measure(resumed)
    assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
    Meter(Settings()).load_state_dict({})  # a checkpoint without any


def test_due_counts_from_one() -> None:
    settings = Settings(every=3)
    assert [i for i in range(1, 10) if settings.due(i)] == [3, 6, 9]


def others(functions: dict[str, Callable[[float], float]]) -> LossesAt:
    return lambda eta, names: {name: (functions[name](eta), 64) for name in names}


def measure_others(
    meter: Meter, functions: dict[str, Callable[[float], float]], step: Step = STEP
) -> Records:
    """Measure a step's own batch, which is :func:`quadratic`, and other data."""
    return meter.measure(step, counted(quadratic)[0], functions, others(functions))


def test_losses_on_other_data_have_records_of_their_own() -> None:
    records = Written()
    meter = Meter(Settings(), sinks=[records])
    functions = {
        "code": lambda eta: 5.0 - eta + 3.0 * eta * eta, "steep": lambda eta: 5.0 + eta
    }  # fmt: skip
    found = measure_others(meter, functions)
    assert meter.write(found) == found and records == list(found.values())
    assert list(found) == ["train", "code", "steep"]
    code, steep = found["code"], found["steep"]
    assert (code.batch, code.status, code.tokens, code.loss) == ("code", "found", 64, 5.0)
    assert code.critical_lr == pytest.approx(1 / 3, rel=1e-6)
    assert code.lr_over_critical == pytest.approx(0.09, rel=1e-6)
    assert code.slope is None and code.update_norm == STEP.update_norm
    assert (steep.status, steep.critical_lr) == ("not_descent", None)
    assert meter.guesses == {"train": found.train.critical_lr, "code": code.critical_lr}
    assert found.scalars() == {**found.train.scalars(), **code.scalars()}
    assert code.scalars().keys() == {
        "critical-sharpness/code", "critical-learning-rate/code",
        "learning-rate-over-critical/code",
    }  # fmt: skip


def test_a_watch_takes_the_numbers_of_other_data_too() -> None:
    meter = Meter(Settings())
    found = measure_others(meter, {"code": lambda eta: 5.0 - eta + 3.0 * eta * eta})
    written = meter.write(found, ["model.cache"])
    assert [record.status for record in written.values()] == ["failed", "failed"]


def test_a_loss_on_other_data_that_falls_by_less_than_its_noise_is_noise_limited() -> None:
    step = replace(STEP, noise=1e-3)  # of the weights, as the training gradient estimates it
    functions = {
        "shallow": lambda eta: 5.0 - 0.1 * eta + 0.5 * eta * eta,  # s·η_c = 0.02
        "deep": lambda eta: 5.0 - eta + 5.0 * eta * eta,  # s·η_c = 0.2
    }
    found = measure_others(Meter(Settings()), functions, step)
    limited = found["shallow"]
    assert limited.status == "noise_limited" and limited.noise == pytest.approx(1e-3, rel=1e-4)
    assert "16 bits" in str(limited.reason) and found["deep"].status == "found"


def test_a_loss_on_other_data_that_does_not_repeat_fails_by_itself() -> None:
    draws: Iterator[float] = itertools.cycle([0.0, 0.2, -0.1])
    functions = {
        "drawn": lambda eta: 5.0 + next(draws), "code": lambda eta: 5.0 - eta + 5.0 * eta * eta
    }  # fmt: skip
    meter = Meter(Settings())
    found = measure_others(meter, functions)
    assert found["drawn"].status == "failed" and "does not repeat" in str(found["drawn"].reason)
    assert found["code"].status == "found"
    assert meter.test.repeat_errors == {"train": 0.0, "code": 0.0}


def test_rounding_next_to_theta_is_no_descent() -> None:
    """The slope is 0, and what is left to fall is the rounding of the loss."""
    flat = {"code": lambda eta: round(5.0 + 30 * eta * eta, 7)}
    assert measure_others(Meter(Settings()), flat)["code"].status == "noise_limited"


def test_steps_that_cannot_be_measured_make_no_probe_of_other_data() -> None:
    def never(eta: float) -> float:
        raise AssertionError

    for changed, status in (({"skipped": "an overflow"}, "skipped_step"), ({"lr": 0.0}, "zero_lr")):
        step = replace(STEP, **changed)  # type: ignore[arg-type]
        found = measure_others(Meter(Settings()), {"code": never}, step)
        assert found["code"].status == found.train.status == status


MODES = ["fp8 delayed", "CUDA graphs local"]
NAMES = ", ".join(MODES)


def test_a_mode_that_tests_itself_is_believed_once_watched_and_tested_each_time() -> None:
    told: list[str] = []
    meter = Meter(Settings(), warn=told.append, self_tested=MODES)
    for watched in (True, False, False):
        assert meter.watches is watched
        loss_at, calls = counted(quadratic)
        records = meter.write(meter.measure(STEP, loss_at), [] if watched else None)
        assert calls.count(0.0) == 1  # not once a run
        assert records.train.self_tested == NAMES and records.train.replay_error == 0.0
    assert len(told) == 1 and f"self-tested in this run: {NAMES}" in told[0]


@pytest.mark.parametrize("terms", [1, 64])
def test_a_replay_may_be_off_by_the_order_of_the_sum_and_by_no_more(terms: int) -> None:
    off = 2 * terms * 2.0**-53 * START
    for error, passes in ((off / 2, True), (2.5 * off, False)):
        meter = Meter(Settings(), warn=lambda message: None, self_tested=MODES)
        step = replace(STEP, terms=terms, training_loss=START + error)
        record = meter.write(meter.measure(step, counted(quadratic)[0]), []).train
        assert (record.status == "found") is passes, record
        assert (meter.ended is None) is passes and bool(record.self_tested) is passes
        assert record.replay_error == pytest.approx(error, rel=0.5)
        if not passes:
            assert record.reason is not None and f"self-test of {NAMES}" in record.reason
            after = measure(meter)
            assert (after.status, after.evaluations, after.reason) == ("failed", 0, record.reason)


def test_a_mode_whose_measurement_changes_something_is_not_believed() -> None:
    told: list[str] = []
    meter = Meter(Settings(), warn=told.append, self_tested=MODES)
    record = meter.write(meter.measure(STEP, counted(quadratic)[0]), ["amax"]).train
    assert (record.status, record.self_tested) == ("failed", None) and not told
    assert meter.ended is not None and "amax" in meter.ended


def test_the_watch_goes_on_until_a_mode_has_passed() -> None:
    """A measurement that fails for another reason has shown nothing."""
    meter = Meter(Settings(), warn=lambda message: None, self_tested=MODES)

    def breaks(eta: float) -> float:
        if eta:
            raise RuntimeError("injected")
        return START

    record = meter.write(meter.measure(STEP, counted(breaks)[0]), []).train
    assert record.status == "failed" and meter.watches
    meter.write(meter.measure(STEP, counted(quadratic)[0]), [])
    assert not meter.watches


def test_what_a_run_has_shown_of_a_mode_is_not_in_its_state() -> None:
    meter = Meter(Settings(), warn=lambda message: None, self_tested=MODES)
    meter.write(meter.measure(STEP, counted(quadratic)[0]), [])
    resumed = Meter(Settings(), self_tested=MODES)
    resumed.load_state_dict(meter.state_dict())
    assert resumed.watches
    unwatched = resumed.write(resumed.measure(STEP, counted(quadratic)[0])).train
    assert unwatched.self_tested is None
