"""The experiment on loss spikes: its analysis of known trainings, and a few steps of one."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

for package in ("hessian_eigenthings", "matplotlib"):
    pytest.importorskip(package, reason=f"needs {package}: pip install .[experiments]")

# ruff: noqa: E402
from experiments import training
from experiments.foresight import analysis, run, tables
from experiments.foresight.run import CASES, Case, Trained
from tests.processes import ROOT

FOLDER = ROOT / "experiments" / "foresight"
CASE = Case("adamw", 0.1, 16, 0, 0)


def known(case: Case = CASE, at: tuple[int, ...] = (100, 200, 300), **columns: Any) -> Trained:
    """400 steps with a loss of 2 that spikes at some steps; η/η_c is 0.9 two steps before, and else
    0.3."""
    noise = np.random.default_rng(case.seed).standard_normal((5, 400))
    given = {
        "loss": 2.0 + 0.02 * noise[0],
        "grad_norm": np.exp(0.1 * noise[1]),
        "ratio": 0.3 * np.exp(0.1 * noise[2]),
        "attention": 0.1 * np.exp(0.1 * noise[3]),
        "mlp": 0.1 * np.exp(0.1 * noise[4]),
    }
    for step in at:
        given["loss"][step - 1 : step + 2] = 3.0
        given["ratio"][step - 3] = 0.9
    return Trained(case, **{**given, **columns})


def test_the_readme_has_the_numbers_of_the_records() -> None:
    page = (FOLDER / "README.md").read_text()
    runs = run.trained(row for rows in training.read(FOLDER).values() for row in rows)
    assert list(runs) == [str(case) for case in CASES]
    trainings, spiking, spikes = tables.counted(runs)
    assert f"{trainings} trainings of a small GPT, {spiking} of them with {spikes} spikes" in page
    for table in tables.TABLES:
        assert "\n".join(table(runs)) in page


def test_spikes_are_found_where_they_begin_and_bad_batches_are_none() -> None:
    assert analysis.spikes(known()) == [99, 199, 299]
    assert analysis.spikes(known(at=(100, 110, 130))) == [99, 129]  # one aftermath
    assert analysis.spikes(known(at=())) == []
    bad = Case("adamw", 0.1, 16, 60, 0)
    loss = known(bad, at=()).loss
    loss[59::60] = 8.0
    assert analysis.spikes(known(bad, at=(), loss=loss)) == []
    loss[60:65] = 3.0  # what follows one is
    assert analysis.spikes(known(bad, at=(), loss=loss)) == [60]


def test_moments_leave_the_aftermath_out_and_look_ahead_alone() -> None:
    seen = analysis.moments(known(), 2)
    # From step 30 to the last that has two after it, less twenty a spike.
    assert len(seen.comes) == 400 - 2 - 29 - 3 * 20
    assert seen.comes.sum() == 3 * 2
    assert analysis.moments(known(at=()), 5).comes.sum() == 0


def test_a_signal_that_tells_is_told_from_those_that_do_not() -> None:
    runs = {str(seed): known(Case("adamw", 0.1, 16, 0, seed)) for seed in range(4)}
    areas = analysis.within_runs(runs, 2)
    assert np.mean(areas["η/η_c"]) > 0.74  # at one of the two steps before
    for name in ("loss", "gradient norm", "attention's", "MLP's"):
        assert 0.3 < np.mean(areas[name]) < 0.7
    chosen, tried = tables.apart(runs)
    assert (list(chosen), list(tried)) == (["0"], ["1", "2", "3"])
    with_it = analysis.foretold(chosen, tried, 2, ("η/η_c", "its rise"))
    without = analysis.foretold(chosen, tried, 2, analysis.RIVALS)
    assert with_it.area > 0.7 and with_it.precision > 0.9 and 0.3 < with_it.recall <= 0.5
    assert with_it.lowest <= with_it.area <= with_it.highest
    assert without.area < 0.7 and without.rate == with_it.rate


def test_an_alarm_counts_that_comes_in_time() -> None:
    loss = np.concatenate([np.full(99, 2.0), np.full(301, 5.0)])
    ratio = np.full(400, 0.3)
    ratio[[96, 97]] = 1.5
    lost = known(at=(), loss=loss, ratio=ratio)
    assert analysis.doubled(lost) == 101 and analysis.doubled(known()) is None
    assert analysis.rings(lost, 1.0, 2) == [98] and analysis.rings(lost, 1.0, 3) == []
    early = ratio.copy()
    early[[96, 97, 20, 21]] = 0.3, 0.3, 1.5, 1.5
    missed = known(at=(), loss=loss, ratio=early)
    false = known(at=(), ratio=early)
    runs = {"a": lost, "b": missed, "c": false}
    found = {(each.threshold, each.after): each for each in analysis.alarms(runs)}
    assert (found[1.0, 2].before, found[1.0, 2].doubles, found[1.0, 2].elsewhere) == (1, 2, 2.5)
    assert (found[1.0, 3].before, found[2.0, 1].elsewhere) == (0, 0.0)


def test_a_training_is_kept_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STEPS", 6)
    case = Case("muon", 0.1, 4, 3, 1)
    made = run.run(case)
    again = Trained.from_row(json.loads(made.to_json()))
    assert again.case == case and len(again.loss) == 6
    for name in run.COLUMNS:
        np.testing.assert_allclose(getattr(again, name), getattr(made, name), rtol=1e-3)
    assert made.loss[2] > 5.4 and np.isfinite(made.ratio).all()  # random bytes
    assert math.isnan(Trained.from_row(json.loads(known(ratio=[math.nan]).to_json())).ratio[0])
