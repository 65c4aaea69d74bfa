"""The experiment on warm-up: its criterion on known cells, and a few trainings of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

for package in ("hessian_eigenthings", "sklearn"):
    pytest.importorskip(package, reason=f"needs {package}: pip install .[experiments]")

# ruff: noqa: E402
import torch

from experiments import training
from experiments.warmup import criterion, run, tables
from experiments.warmup.criterion import Cell
from experiments.warmup.run import Problem, Ramp, first_update
from tests.processes import ROOT

FOLDER = ROOT / "experiments" / "warmup"


def test_the_readme_has_the_tables_of_the_records() -> None:
    page, runs = (FOLDER / "README.md").read_text(), training.read(FOLDER)
    for table in (tables.savings, tables.starts):
        assert "\n".join(table(runs)) in page
    assert f"**{'Met' if criterion.outcome(criterion.cells(runs)).met else 'Not met'}" in page


def cell(plain: list[float], cut: list[float | None], saved: int = 5) -> Cell:
    rows: list[dict[str, Any]] = [
        {"plain": a, "cut": b, "saved": saved} for a, b in zip(plain, cut, strict=True)
    ]
    return Cell("digits-sharp", "sgd", 16, 0.1, tuple(rows))


def test_a_cell_saves_within_the_scatter() -> None:
    plain = [0.10, 0.12, 0.14]  # a scatter of 0.02
    assert cell(plain, [0.12, 0.13, 0.15]).saves()
    assert not cell(plain, [0.14, 0.14, 0.15]).saves()
    assert not cell(plain, [0.10, 0.10, 0.10], saved=0).saves()
    lost = cell(plain, [0.10, 0.10, None])
    assert lost.lost() and not lost.saves()
    kept = [cell(plain, plain)] * 9
    assert criterion.outcome([*kept, cell(plain, [0.2] * 3)]).met
    assert not criterion.outcome([*kept, lost]).met
    assert not criterion.outcome([*kept[1:], cell(plain, plain, 0), cell(plain, [0.2] * 3)]).met
    assert criterion.judged([cell([0.1, 0.1, math.inf], plain)]) == []  # diverges by itself


def test_a_ramp_from_the_critical_rate_joins_the_plain_one() -> None:
    ramp = Ramp(0.4, 16)
    plain = [ramp.rate_at(step) for step in range(1, 20)]
    assert (plain[0], plain[15], plain[18]) == (0.025, 0.4, 0.4)
    assert ramp.saved(0.1) == 3  # 0.1 is the rate of the fourth step
    assert [ramp.rate_at(step, 0.1) for step in range(1, 17)] == pytest.approx(plain[3:])
    assert (ramp.saved(0.04), ramp.saved(9.0), ramp.saved(None)) == (0, 15, 0)
    assert ramp.rate_at(1, 9.0) == 0.4


@pytest.mark.parametrize("optimizer", run.OPTIMIZERS)
def test_the_critical_rate_parts_a_first_step_that_lowers_the_loss(optimizer: str) -> None:
    problem = Problem("digits-sharp", optimizer, 0)
    critical = first_update(problem).critical_lr
    assert critical is not None
    batch = problem.batch_at(1)
    for factor, rises in ((0.8, False), (1.3, True)):
        network = problem.network()
        stepper = problem.optimizer_of(network)
        stepper.param_groups[0]["lr"] = factor * critical
        before = problem.loss(network, batch)
        before.backward()
        stepper.step()
        with torch.no_grad():
            assert (problem.loss(network, batch) > before).item() == rises


def test_gi_adams_second_moments_begin_at_the_first_gradient_squared() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = run.GIAdam([weight], lr=0.1, betas=(0.9, 0.99), eps=0.0)
    first, second = torch.tensor([[2.0, -0.5], [4.0, 1.0]], dtype=torch.float64)
    weight.grad = first
    optimizer.step()
    steps = [weight.detach().clone()]
    weight.grad = second
    optimizer.step()
    steps.append(weight.detach() - steps[0])
    moments = 0.99 * first**2 + 0.01 * second**2  # after the first step they still are g₁²
    momentum = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    assert torch.allclose(steps[0], -0.1 * (1 - 0.99) ** 0.5 * first.sign())
    assert torch.allclose(steps[1], -0.1 * momentum / (moments / (1 - 0.99**2)).sqrt())


def test_the_sharp_start_is_sharper_than_the_flat_one() -> None:
    sharp, flat = (Problem(f"digits-{start}", "sgd", 0) for start in ("sharp", "flat"))
    assert flat.network()(flat.batch_at(1)[0]).abs().max() == 0.0  # its last layer is of zeros
    rates = [first_update(problem).critical_lr for problem in (sharp, flat)]
    assert rates[0] is not None and rates[1] is not None and rates[0] < 0.7 * rates[1]


def test_a_warm_up_trains_where_none_diverges() -> None:
    problem, target = Problem("digits-sharp", "sgd", 0), 0.32
    (none,), _ = run.train(problem, Ramp(target, 1).rate_at, (96,))
    (warm,), ratios = run.train(problem, Ramp(target, 16).rate_at, (96,), every=8)
    assert none == math.inf and warm < criterion.TRAINS * run.chance("digits")
    assert 0.0 < max(ratio for ratio in ratios if ratio is not None) < 2.0
