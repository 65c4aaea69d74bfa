"""The experiment on recurrence: a short training of it, and its analysis of known numbers."""

from __future__ import annotations

import json

import pytest

for package in ("hessian_eigenthings", "matplotlib"):
    pytest.importorskip(package, reason=f"needs {package}: pip install .[experiments]")

# ruff: noqa: E402
import numpy as np
import torch

from experiments.gpt_wsd import run as gpt
from experiments.recurrence import analysis, run
from experiments.recurrence.run import Case, Trained


def test_one_turn_is_a_plain_gpt_and_more_are_loops_of_its_core() -> None:
    tokens = gpt.batch_at(1, 2)[:, :-1]
    plain = gpt.model(run.PRELUDE + run.CORE + run.CODA, run.WIDTH, 0)
    for loop in ("injected", "bare"):
        it = run.Training(Case(loop, "1", "same", 0), run.WIDTH)
        assert torch.equal(it.network(tokens), plain(tokens))
        assert it.loss_at(3, tokens) != it.loss_at(1, tokens)
        it.next, it.loop.turns = 3, 2
        assert it.deeper()[0] == it.loss_at(3, it.batch) != it.loss_at(2, it.batch)
        assert it.loop.turns == 2
        e = torch.randn(2, 4, run.WIDTH)
        once = it.loop.blocks[0](e, None)
        again = once + e if loop == "injected" else once
        assert torch.equal(it.loop(e, None), it.loop.blocks[0](again, None))


def test_depths_grow_where_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JUMPS": (13,), "RETROFIT": 13, "WINDOW": 4}.items():
        monkeypatch.setattr(run, name, value)
    for name in ("STEPS", "RETROFIT_STEPS", "PLAIN_STEPS"):
        monkeypatch.setattr(run, name, 18)
    plain, doubled = (run.run(Case("bare", each, "same", 0), 16) for each in ("1", "doubled"))
    for name in ("loss", "sharpness"):  # the same batches
        np.testing.assert_array_equal(*(getattr(each, name)[:12] for each in (plain, doubled)))
    assert np.all(plain.loss[12:18] != doubled.loss[12:])
    assert list(np.flatnonzero(np.isfinite(doubled.sharpness)) + 1) == [5, *range(9, 17)]
    assert list(np.flatnonzero(np.isfinite(doubled.deeper)) + 1) == [9, 10, 11, 12]
    monkeypatch.setattr(run, "DEEPEST", 1)
    same = run.run(Case("bare", "retrofit", "same", 0), 16)
    np.testing.assert_array_equal(same.loss[:13], plain.loss[:13])  # a retrofit to what it is
    warmed = Case("bare", "retrofit", "warm-up", 0)
    assert [warmed.lr(step) for step in (12, 13)] == [plain.lr[11], run.RATE / run.WARMUP]
    np.testing.assert_allclose(same.deeper[8:12], same.sharpness[8:12], rtol=1e-2)
    again = Trained.from_row(json.loads(json.dumps(doubled.to_row())))
    assert again.case == doubled.case
    for name in run.COLUMNS:
        np.testing.assert_allclose(getattr(again, name), getattr(doubled, name), rtol=1e-3)


def known(curriculum: str, loss: float, sharpness: float, deeper: float) -> Trained:
    """λ_c is 100 and the loss 3 before the last jump, and these after it."""
    case = Case("injected", curriculum, "same", 0)
    steps, late = case.steps, np.arange(1, case.steps + 1) >= run.JUMPS[-1]
    return Trained(
        case, np.where(late, loss, 3.0), np.full(steps, 5e-3), np.where(late, sharpness, 100.0),
        np.full(steps, deeper), np.linspace(3.0, 2.0, steps // run.HELD_EVERY), np.full(4, 2.0),
    )  # fmt: skip


def test_the_analysis_of_known_numbers() -> None:
    plain, doubled = known("1", 2.9, 50.0, 100.0), known("doubled", 3.1, 200.0, 300.0)
    runs = {str(each.case): each for each in (plain, doubled)}
    jump = run.JUMPS[-1]
    assert list(analysis.pairs(runs, "injected", "doubled")) == [(doubled, plain)]
    assert analysis.rise(doubled, plain, jump) == pytest.approx(4.0)
    assert analysis.excess(doubled, plain, jump) == pytest.approx(0.2)
    assert analysis.foretold(doubled, jump) == pytest.approx(3.0)
    assert analysis.edges(doubled, jump) == pytest.approx(np.full(run.WINDOW, 0.5))
    assert analysis.late(doubled) == 200.0
    assert analysis.held_at(plain, 3 * 20) == 3.0
    assert analysis.held_at(plain, 3 * 460) == 2.0
    assert analysis.cost(doubled)[-1] == 89 * 3 + 50 * 4 + 50 * 6 + 51 * 10
    assert -0.4 < analysis.against_plain(doubled, plain) < 0.0
