"""The phase diagram: its critical values on networks made here, and the four regimes in time."""

from __future__ import annotations

import pytest

for package in ("hessian_eigenthings", "sklearn"):
    pytest.importorskip(package, reason=f"needs {package}: pip install .[experiments]")

# ruff: noqa: E402
import torch
from hessian_eigenthings import HessianOperator

from experiments import digits, training
from experiments.phase_diagram import analysis, claims, run
from megatron_sharpness import reference
from tests.processes import ROOT

CELL = run.Cell("linear", 4, 64, 0)


def test_loss_sharpness_and_divergence_come_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "QUARTERS", (4, 8, 11, 13, 20))
    rows = run.run(CELL)
    assert [analysis.phase(row) for row in rows] == [
        analysis.FALLS, analysis.LOSS_RISES, analysis.SHARPNESS_RISES, analysis.DIVERGES
    ]  # fmt: skip
    (found,) = analysis.critical_values(rows)
    assert (found.loss, found.sharpness, found.largest) == (4.0, 2 ** (11 / 4), 2 ** (11 / 4))
    assert rows[0]["c"] < found.of_first_step < rows[1]["c"]
    for row in rows:  # the first step raises the loss from there on
        assert (row["loss"][1] > row["loss"][0]) == (row["c"] > found.of_first_step)


def test_the_largest_eigenvalue_is_the_references() -> None:
    model, batch = CELL.network(), digits.images(run.EXAMPLES, 1.0)
    parameters = list(model.parameters())
    near = None
    for _ in range(2):  # from the gradient, and from the eigenvector a step before
        loss = digits.squared_error(model, batch)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        found, near = run.largest_eigenvalue(gradients, parameters, near)
        operator = HessianOperator(model, [None], lambda *_: digits.squared_error(model, batch))
        assert found == pytest.approx(reference.largest_eigenvalue(operator), rel=2e-3)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.01 * gradient


def test_the_report_names_the_four_regimes_in_order() -> None:
    runs = training.read(ROOT / "experiments" / "phase_diagram")
    found = [claims.regimes_in_order(runs[f"regimes-{seed}"]) for seed in run.REGIME_SEEDS]
    assert found == [4] * 7 + [3]  # the last one rests below the line for long
    assert claims.regimes_in_order(runs["regimes-0"][40:]) < 4
