"""Second moments that are means: the optimizer, and the rule from a training made anew."""

from __future__ import annotations

import pytest

for package in ("hessian_eigenthings", "sklearn"):
    pytest.importorskip(package, reason=f"needs {package}: pip install .[experiments]")

# ruff: noqa: E402
import torch
from torch import nn

from experiments.gpt_wsd import run as gpt
from experiments.slim_adam import run as slim
from experiments.slim_adam.optimizer import SlimAdamW


def steps(optimizer: torch.optim.Optimizer, model: nn.Linear) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return model.weight.detach()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4, bias=False).double()


def test_without_means_it_is_adamw() -> None:
    own, theirs = linear(), linear()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    groups = [{"params": list(own.parameters()), "over": None}]
    expected = steps(torch.optim.AdamW(theirs.parameters(), **options), theirs)
    torch.testing.assert_close(steps(SlimAdamW(groups, **options), own), expected)


@pytest.mark.parametrize(
    ("over", "shape"), [("fan_in", (4, 1)), ("fan_out", (1, 6)), ("both", (1, 1))]
)
def test_means_are_of_the_second_moments(over: str, shape: tuple[int, int]) -> None:
    model = linear()
    groups = [{"params": list(model.parameters()), "over": over}]
    optimizer = SlimAdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    steps(optimizer, model)
    kept = optimizer.state[model.weight]["exp_avg_sq"]
    whole = linear()  # with a learning rate of 0 the gradients are the same
    adam = torch.optim.AdamW(whole.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    steps(adam, whole)
    dimensions = {"fan_in": 1, "fan_out": 0, "both": (0, 1)}[over]
    expected = adam.state[whole.weight]["exp_avg_sq"].mean(dim=dimensions, keepdim=True)
    assert kept.shape == shape
    torch.testing.assert_close(kept, expected)


def test_a_training_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "STEPS", 100)
    rows = slim.run("adamw", slim.RATES[0], 0, {})
    means = slim.means_of("slim", slim.rule(rows))
    assert means["blocks.qkv.weight"] == means["embedding.weight"] == "fan_in"
    assert means["blocks.down.weight"] == "fan_out"
    assert rows[-1]["held_out"] > 0.0
