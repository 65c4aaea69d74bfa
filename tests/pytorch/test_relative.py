"""Losses on other data along the training update, and training that is taken back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from megatron_sharpness.core.errors import InputError, ProbeError
from megatron_sharpness.pytorch import CriticalSharpness

from .gpt import loss_sum, make_batch
from .test_critical_sharpness import Loop, same, undisturbed

TRAINED = torch.tensor([4.0, 1.0, 0.3], dtype=torch.float64)
OTHER = torch.tensor([1.0, 9.0, 2.0], dtype=torch.float64)


class Quadratic(nn.Module):
    """½ Σ hᵢθᵢ² with the curvatures h that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, curvature: Tensor) -> Tensor:
        return 0.5 * (curvature * self.theta * self.theta).sum()


def quadratic_step(sharpness: CriticalSharpness, model: Quadratic, optimizer: SGD) -> None:
    optimizer.zero_grad()
    model(TRAINED).backward()
    optimizer.step()
    sharpness.after_step(1, lambda: (model(TRAINED), 1))


def test_two_quadratics_have_the_critical_learning_rate_of_the_definition() -> None:
    model = Quadratic()
    optimizer = SGD(model.parameters(), lr=1e-2)
    sharpness = CriticalSharpness(
        model,
        optimizer,
        every=1,
        losses={
            "other": lambda: (model(OTHER), 1),
            "same": lambda: (model(TRAINED), 1),
            "rises": lambda: (100 - model(TRAINED), 1),
        },
    )
    theta = model.theta.detach().clone()
    update = TRAINED * theta  # SGD: the gradient of the loss that is trained on
    quadratic_step(sharpness, model, optimizer)
    records = sharpness.records
    # L₁(θ − ηΔ) = L₁(θ) at η = 2⟨∇L₁, Δ⟩/ΔᵀH₁Δ
    exact = 2 * (OTHER * theta) @ update / (update @ (OTHER * update))
    assert records["other"].status == "found"
    assert records["other"].critical_lr == pytest.approx(exact.item(), rel=1e-9)
    assert records["other"].critical_sharpness == pytest.approx(2 / exact.item(), rel=1e-9)
    assert records["other"].loss == pytest.approx(0.5 * (OTHER * theta * theta).sum().item())
    assert records["same"].critical_lr == pytest.approx(records["train"].critical_lr, rel=1e-9)
    assert records["rises"].status == "not_descent"
    assert records["rises"].critical_sharpness is None  # ∞
    assert [record.batch for record in records.values()] == ["train", "other", "same", "rises"]
    tags = sharpness.scalars()
    assert tags["critical-sharpness/other"] == records["other"].critical_sharpness
    assert tags["critical-sharpness"] == records["train"].critical_sharpness
    assert "critical-sharpness/rises" not in tags


def with_losses(**options: Any) -> Loop:
    loop = Loop(every=2, **options)

    def other() -> tuple[Tensor, Tensor]:
        torch.rand(3)  # whatever it draws
        return loss_sum(loop.model, make_batch(50, 0, 0))

    loop.sharpness._losses.update(other=other, more=other)
    return loop


def test_training_is_bit_for_bit_the_one_without() -> None:
    loop = with_losses()
    for step in range(6):
        loop.step(step)
    assert same(loop.state(), undisturbed(6))
    assert all(module.training for module in loop.model.modules())
    assert [record.batch for record in loop.records] == ["train", "other", "more"] * 3
    for train, other, more in zip(*[iter(loop.records)] * 3, strict=True):
        assert other.status == "found" and train.critical_lr != other.critical_lr
        # In evaluation mode, at the same weights: dropout draws nothing, and equal data is equal.
        assert (other.critical_lr, other.loss) == (more.critical_lr, more.loss)


def test_each_loss_has_a_warm_start_of_its_own_also_after_a_resume() -> None:
    loop = with_losses()
    for step in range(3):
        loop.step(step)
    state = loop.sharpness.state_dict()
    assert state["guesses"] == [[r.batch, r.critical_lr] for r in loop.records[-3:]]
    other = Loop(every=2)
    other.sharpness.load_state_dict(state)
    assert other.sharpness.state_dict() == state


def test_a_loss_that_fails_costs_its_measurement_and_not_the_step() -> None:
    loop = with_losses()

    def broken() -> tuple[Tensor, int]:
        raise OSError("no such shard")

    loop.sharpness._losses["more"] = broken
    with pytest.warns(UserWarning, match="OSError: no such shard"):
        for step in range(2):
            loop.step(step)
    assert [record.status for record in loop.records] == ["found", "failed", "failed"]
    assert same(loop.state(), undisturbed(2))
    strict = with_losses(on_error="raise")
    strict.sharpness._losses["more"] = broken
    with pytest.raises(ProbeError, match="no such shard"):
        strict.step(0)


def test_frozen_training_moves_the_moments_and_nothing_else() -> None:
    loop = with_losses(frozen=2)
    start = [value.clone() for value in loop.model.state_dict().values()]  # with the buffers
    moments = []
    for step in range(1, 7):
        loop.step(step)
        assert same(list(loop.model.state_dict().values()), start)
        moments.append(next(iter(loop.optimizer.state.values()))["exp_avg"].clone())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(moments))
    # Steps 1 and 2 are for the moments; of the others, the even ones are due.
    assert [record.iteration for record in loop.records if record.batch == "train"] == [4, 6]
    assert {record.status for record in loop.records} == {"found"}


def test_a_frozen_step_measures_what_the_same_step_measures_in_training() -> None:
    first = Loop(every=1, frozen=0).step(1)
    second = Loop(every=1).step(1)
    assert first is not None and second is not None
    assert (first.critical_lr, first.loss) == (second.critical_lr, second.loss)


@pytest.mark.parametrize("name", ["train", "a b", "", "x/y"])
def test_a_name_that_no_tag_can_have_is_refused(name: str) -> None:
    model = Quadratic()
    with pytest.raises(InputError, match=r"losses=.*give one of letters"):
        CriticalSharpness(
            model, SGD(model.parameters(), lr=1.0), losses={name: lambda: (model(OTHER), 1)}
        )


def test_a_negative_number_of_frozen_steps_is_refused() -> None:
    model = Quadratic()
    with pytest.raises(InputError, match="frozen=-1"):
        CriticalSharpness(model, SGD(model.parameters(), lr=1.0), frozen=-1)
