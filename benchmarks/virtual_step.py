"""Critical sharpness as the paper's Section 2 describes it, to compare with.

Before the optimizer steps: clone every parameter, evaluate L(θ), and for every learning rate of the
exponential and binary search (Algorithms 1 and 2) make the optimizer's step of that learning rate
anew from its state and the gradients, evaluate, and put the clones back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sharpness.core.search import SearchResult, find_critical_lr


@torch.no_grad()
def critical_lr(
    optimizer: torch.optim.AdamW, evaluate: Callable[[], float], guess: float
) -> SearchResult:
    """η_c of AdamW's coming step, by bisection from ``guess``."""
    (group,) = optimizer.param_groups
    clones = [parameter.clone() for parameter in group["params"]]

    def loss_at(lr: float) -> float:
        for parameter in group["params"]:
            parameter.sub_(_update(optimizer.state[parameter], parameter, group), alpha=lr)
        loss = evaluate()
        for parameter, clone in zip(group["params"], clones, strict=True):
            parameter.copy_(clone)
        return loss

    return find_critical_lr(loss_at, loss=evaluate(), guess=guess, method="bisection")


def _update(state: dict[str, Tensor], parameter: Tensor, group: dict[str, float]) -> Tensor:
    """Δθ of AdamW: m̂/(√v̂ + ε) + γθ."""
    beta1, beta2 = group["betas"]  # type: ignore[misc]
    assert parameter.grad is not None
    step = float(state["step"]) + 1.0
    mean = torch.lerp(state["exp_avg"], parameter.grad, 1.0 - beta1)
    square = state["exp_avg_sq"] * beta2
    square.addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
    denominator = square.div_(1.0 - beta2**step).sqrt_().add_(group["eps"])
    return mean.div_(1.0 - beta1**step).div_(denominator).add_(
        parameter, alpha=group["weight_decay"]
    )
