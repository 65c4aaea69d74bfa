"""AdamW whose second moments are means (Kalra et al. 2025, arXiv 2503.01843, SlimAdam)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

#: Dimensions of a matrix that its second moments are averaged over.
DIMENSIONS: dict[str | None, tuple[int, ...]] = {
    None: (), "fan_in": (1,), "fan_out": (0,), "both": (0, 1)
}  # fmt: skip


class SlimAdamW(Optimizer):
    """m ← β₁m + (1 − β₁)g and v ← β₂v + (1 − β₂)E_K[g²], and AdamW's update with them.

    Args:
        groups: of parameters, each with ``over``, one of :data:`DIMENSIONS`: what K is.
        lr, betas, eps, weight_decay: AdamW's.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        squares = gradient.square()
        if dimensions := DIMENSIONS[group["over"]]:
            squares = squares.mean(dim=dimensions, keepdim=True)
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(squares)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** state["step"])
        square = state["exp_avg_sq"].lerp_(squares, 1 - beta2) / (1 - beta2 ** state["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))
