"""Signal-to-noise ratios in loops of one's own: what is left out, and what is refused.

That they are right on all ranks is seen under every layout (test_layouts.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.slim_adam.optimizer import SlimAdamW
from megatron_sharpness.core.errors import SettingError
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.pytorch import CriticalSharpness


class Model(nn.Module):
    """A matrix, a stack of two, a vector, convolutions, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(6, 4)
        self.experts = nn.Parameter(0.3 * torch.randn(2, 4, 5))
        self.filters = nn.Conv2d(1, 1, 2)
        self.line = nn.Conv1d(1, 1, 1)
        self.empty = nn.Parameter(torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = torch.einsum("ni,eio->nio", self.matrix(x), self.experts)
        filtered = self.line(self.filters(mixed[:, None]).flatten(2)).flatten(1)
        return filtered.sum(dim=1) + self.empty.sum()


def measured(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Measurement:
    sharpness = CriticalSharpness(model, optimizer, every=1, adam_snr=True, **options)
    record = None
    for step in range(3):
        x = torch.randn(32, 6)

        def evaluate(x: Tensor = x) -> tuple[Tensor, int]:
            return F.mse_loss(model(x), x[:, 0], reduction="sum"), len(x)

        loss, tokens = evaluate()
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        record = sharpness.after_step(step, evaluate)
    assert record is not None and record.status != "failed", record
    return record


def ratio(v: Tensor) -> float:
    return (v.mean() ** 2 / v.var(correction=0)).item()


def test_matrices_and_stacks_of_them() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    found = measured(model, optimizer).adam_snr
    assert found is not None and set(found) == {"matrix.weight", "experts"}
    assert found["experts"]["shapes"] == [[2, 4, 5]]
    v = optimizer.state[model.experts]["exp_avg_sq"].double()
    expected = sum(ratio(row) for expert in v for row in expert) / 8
    assert found["experts"]["fan_in"] == pytest.approx(expected, rel=1e-9)
    expected = sum(ratio(column) for expert in v for column in expert.T) / 10
    assert found["experts"]["fan_out"] == pytest.approx(expected, rel=1e-9)


def test_a_frozen_run_measures_them_too() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert measured(model, optimizer, frozen=1).adam_snr is not None


def test_moments_that_are_means_already_are_left_out() -> None:
    model = Model()
    matrix = model.matrix.weight
    rest = [p for p in model.parameters() if p is not matrix]
    groups = [{"params": [matrix], "over": "fan_in"}, {"params": rest, "over": None}]
    found = measured(model, SlimAdamW(groups, 1e-3, (0.9, 0.95), 0.0)).adam_snr
    assert found is not None and set(found) == {"experts"}


def test_moments_of_another_basis_are_left_out() -> None:
    class SOAP(torch.optim.AdamW):
        """Keeps them of rotated gradients."""

    model = Model()
    rest = [p for p in model.parameters() if p is not model.matrix.weight]
    optimizers = [SOAP([model.matrix.weight], lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]
    sharpness = CriticalSharpness(model, optimizers, every=1, adam_snr=True)
    x = torch.randn(32, 6)
    model(x).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    record = sharpness.after_step(0, lambda: (model(x).square().sum(), 32))
    assert record is not None and record.adam_snr is not None
    assert set(record.adam_snr) == {"experts"}


def test_an_optimizer_without_them_is_refused() -> None:
    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SettingError, match="adam_snr=True: SGD keeps no exp_avg_sq; train"):
        CriticalSharpness(model, sgd, adam_snr=True)
    with pytest.raises(SettingError, match="adam_snr='yes': give True"):
        CriticalSharpness(model, sgd, adam_snr="yes")
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(SettingError, match=r"adam_snr=True: .* is off; give an interval"):
        CriticalSharpness(model, adam, every=0, adam_snr=True)


def test_one_that_has_none_after_all_says_so_once(recwarn: pytest.WarningsRecorder) -> None:
    class Lion(torch.optim.Optimizer):
        """Its sign of the momentum, without second moments."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 1e-4, "betas": (0.9, 0.99)})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(1e-4 * parameter.grad.sign())

    model = Model()
    assert measured(model, Lion(model.parameters())).adam_snr is None
    said = [str(w.message) for w in recwarn if "adam_snr" in str(w.message)]
    assert len(said) == 1 and "no optimizer has second moments" in said[0]
