"""The experiment on learning rates: its analysis of known sweeps, and one small training of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

for package in ("hessian_eigenthings", "matplotlib"):
    pytest.importorskip(package, reason=f"needs {package}: pip install .[experiments]")

# ruff: noqa: E402
from experiments.learning_rate import prediction, run, tables, verdicts
from experiments.learning_rate.run import CHOSEN_ON, FIVE, STEPS, TRIED_ON, Case, Training
from megatron_sharpness.report.verdict import DIVERGED, FAR_TOO_LOW, USUAL
from tests.processes import ROOT

README = ROOT / "experiments" / "learning_rate" / "README.md"
CASE = Case("adamw", 64, 16, "wsd", 0)


def known(case: Case = CASE, power: float = 0.5, best: float = 4e-3) -> list[Training]:
    """η/η_c = 0.2·(η/best)^power all along, and the lowest final loss at ``best``."""
    sweep = []
    for peak in case.rates:
        final = 2.0 + 0.1 * math.log(peak / best) ** 2
        seen = peak / (0.2 * (peak / best) ** power)  # η_c at the peak rate
        measured: list[tuple[float | None, float | str]] = [(final, seen)] * (STEPS // run.EVERY)
        sweep.append(Training(case, peak, final, STEPS, measured))
    return sweep


def test_the_readme_has_the_numbers_of_the_records() -> None:
    page = README.read_text()
    for table in tables.TABLES:
        assert "\n".join(table()) in page


def test_as_many_trainings_are_tried_as_were_promised() -> None:
    assert not set(CHOSEN_ON) & set(TRIED_ON) and FIVE not in (*CHOSEN_ON, *TRIED_ON)
    assert {case.optimizer for case in TRIED_ON} == {"adamw", "muon", "sgd"}
    assert {case.width for case in TRIED_ON} == {32, 64, 128}
    for case in TRIED_ON:
        assert case.rates[-1] / case.rates[0] == pytest.approx(1e4)
    assert len(prediction.sweeps(run.read())) == 1 + len(CHOSEN_ON) + len(TRIED_ON)


def test_a_known_power_is_predicted() -> None:
    sweep = known()
    assert prediction.best(sweep) == pytest.approx(4e-3, rel=1e-6)
    three = prediction.short(sweep)
    assert [each.peak for each in three] == [1e-3, 1e-2, 1e-1]
    assert prediction.by_ratio(0.2)(three) == pytest.approx(4e-3, rel=1e-3)
    assert prediction.by_ratio(0.4)(three) == pytest.approx(16e-3, rel=1e-3)
    assert prediction.by_loss(three) == pytest.approx(4e-3, rel=0.2)
    found = prediction.outcome(prediction.by_ratio(0.2), {CASE: sweep})
    assert (found.within, found.fine, found.typical) == (1, 1, pytest.approx(1.0, rel=1e-3))
    far = prediction.outcome(prediction.by_ratio(0.8), {CASE: sweep})
    assert (far.within, far.fine, far.typical) == (0, 0, pytest.approx(16.0, rel=1e-2))
    assert prediction.chosen_target({CASE: sweep}) == pytest.approx(0.2, rel=0.2)


def test_what_was_lost_predicts_nothing() -> None:
    sweep = known()
    lost = [replace(each, steps=30, final=math.inf) for each in sweep]
    three = prediction.short([*sweep[:4], *lost[4:]])  # two of them
    assert math.isnan(prediction.by_ratio(0.2)(three))
    found = prediction.outcome(prediction.by_ratio(0.2), {CASE: [*sweep[:4], *lost[4:]]})
    assert (found.within, found.fine) == (0, 0)
    assert prediction.regret(sweep, 1e3) == math.inf


def test_verdicts_are_counted_against_the_final_losses() -> None:
    sweep = known(power=1.0)
    truths = verdicts.truths(sweep)
    assert truths == sorted(truths, key=verdicts.TRUTHS.index)
    counted = verdicts.confusion([sweep])
    assert counted[FAR_TOO_LOW, "too low"] == 3 and counted[USUAL, "within 10 %"] >= 1
    assert counted[DIVERGED, "too high"] == 0
    assert sum(counted.values()) == len(sweep)
    assert verdicts.right(counted, [FAR_TOO_LOW]) == 1.0
    assert verdicts.at_best(sweep) == pytest.approx(0.2 * 4.64 / 4.0, rel=1e-3)


def test_a_training_is_kept_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STEPS", 40)
    case = Case("muon", 32, 4, "cosine", 3)
    made = run.run(case, 1e-2)
    assert made.steps == 40 and len(made.measured) == 40 // run.EVERY
    again = Training.from_row(json.loads(made.to_json()))
    assert (again.case, again.steps) == (case, 40)
    for ours, read in zip(made.run.records, again.run.records, strict=True):
        assert read["status"] == ours["status"] == "found"
        for field in ("iteration", "lr", "loss", "critical_lr", "lr_over_critical", "tokens"):
            assert read[field] == pytest.approx(ours[field], rel=1e-4)
    assert made.final < 5.6
