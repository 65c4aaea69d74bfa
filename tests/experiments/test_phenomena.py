"""The phenomena of the paper: in the committed records, and in runs made here and now."""

from __future__ import annotations

import pytest

for package in ("hessian_eigenthings", "sklearn"):
    pytest.importorskip(package, reason=f"needs {package}: pip install .[experiments]")

# ruff: noqa: E402
import numpy as np

from experiments import claims, training
from experiments.adam_edge import run as adam_edge
from experiments.batch import run as batch
from experiments.fcn import run as fcn
from experiments.gpt_wsd import run as gpt
from experiments.gpt_wsd.claims import rise
from experiments.parts import run as parts
from experiments.uv import model as uv
from experiments.weight_decay import run as weight_decay
from tests.processes import ROOT

CLAIMS = claims.claims()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.experiment}, {claim.case}")
def test_the_records_bear_the_claim_out(claim: claims.Claim) -> None:
    assert claim.holds, claim


def test_the_readmes_have_these_numbers() -> None:
    assert claims.table() in (ROOT / "experiments" / "README.md").read_text()
    number = sum(len(list(claims.rows(name))) for name in claims.EXPERIMENTS)
    assert f"{number} claims" in (ROOT / "README.md").read_text()
    for name in claims.EXPERIMENTS:
        assert claims.table_of(name) in (ROOT / "experiments" / name / "README.md").read_text()


def test_uv_runs_are_the_committed_ones() -> None:
    committed = training.read(ROOT / "experiments" / "uv")
    for name in uv.RUNS:
        rows = uv.run(name)
        assert [row["status"] for row in rows] == ["found"] * len(rows)
        for field in ("critical_sharpness", "exact_directional_sharpness", "hessian_sharpness"):
            assert training.column(rows, field) == pytest.approx(
                training.column(committed[name], field), rel=1e-3
            )


def test_periods_double_beyond_the_edge() -> None:
    rates = [0.49, 0.55, 0.63, 0.646, 0.7]
    periods = [uv.period(orbit) for orbit in uv.orbits(np.array(rates))]
    assert periods == [1, 2, 4, 8, None]


def test_weight_decay_moves_the_edge_of_the_hessian_alone() -> None:
    edges = weight_decay.edges(weight_decay.run(0.2, weight_decay.BEYOND * 2 / 3.6))
    assert edges["hessian_sharpness"] == pytest.approx(edges["2/lr - decay"], rel=2e-3)
    assert edges["directional_sharpness"] == pytest.approx(edges["2/lr"], rel=2e-3)


def test_full_batch_gradient_descent_settles_at_the_edge() -> None:
    rows = fcn.run("full-batch", exact_every=800)
    assert fcn.plateau(rows, "critical_sharpness") == pytest.approx(1.0, abs=0.05)
    for row in rows:
        if "hessian_sharpness" in row:
            assert row["exact_directional_sharpness"] <= row["hessian_sharpness"] * (1 + 1e-3)
    assert training.column(rows, "hessian_sharpness")[-1] == pytest.approx(2 / fcn.LR, rel=0.1)


def test_adam_settles_at_two_edges() -> None:
    found = adam_edge.plateau(adam_edge.run(0.5))
    assert found["critical_sharpness"] == pytest.approx(1.0, abs=0.05)
    assert found["preconditioned_sharpness"] == pytest.approx(1.0, abs=0.1)


def test_critical_sharpness_of_a_gpt_rises_when_the_learning_rate_decays() -> None:
    rows = gpt.run("wsd", gpt.RATES[-1], exact_every=gpt.STEPS)
    assert rise(rows) > 1.3


def test_a_small_batch_and_another_are_measured_along_one_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch, "REPEATS", 2)
    rows = batch.run(batch.SIZES[0])
    assert [row["status"] for row in rows] == ["found"] * 4
    own, other = (batch.sharpness_of(rows, name) for name in batch.BATCHES)
    assert np.all(other > own)


def test_muons_group_breaks_before_adamws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "STEPS", 250)
    rows = parts.run("muon", "groups")
    assert parts.parts_in(rows) == ["adamw", "muon"]
    ratios = [parts.stable_ratio(rows, part) for part in ("muon", "adamw")]
    assert ratios[0] > 1.05 * ratios[1] > 0.0
    assert 2.0 <= parts.passes(rows) <= 3.0
