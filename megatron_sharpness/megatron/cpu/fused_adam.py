"""Transformer Engine's ``FusedAdam`` on the CPU: its interface, its states, its rounding.

As in Transformer Engine 2.20 (``optimizers/fused_adam.py``, ``multi_tensor/adam.cu``), without fp8
states. What a measurement makes of those states (``shards/precision_aware.py``) is written by
itself, so that each shows the other's errors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: Megatron looks for it there.
_ENGINE = (
    "transformer_engine",
    "transformer_engine.pytorch",
    "transformer_engine.pytorch.optimizers",
)


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose moments, masters and gradients have types of their own.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: of the running means of the gradient and its square.
        eps: added to the root of the second.
        weight_decay: λ, decoupled with ``adam_w_mode``.
        bias_correction: divide the means by 1 − βᵗ.
        adam_w_mode: decoupled weight decay.
        capturable: of a CUDA graph; no matter here.
        master_weights: keep masters of parameters in 16 bits.
        master_weight_dtype: fp32, or fp16, which is scaled by a number for each parameter.
        exp_avg_dtype: of the first moment.
        exp_avg_sq_dtype: of the second.
        use_decoupled_grad: read ``decoupled_grad`` and not ``grad``.
        store_param_remainders: of a master of a bf16 parameter in fp32 keep the 16 bits that the
            parameter lacks.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        self.master_weights = master_weights
        self.master_weight_dtype = master_weight_dtype
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = (
            store_param_remainders and master_weights and master_weight_dtype == torch.float32
        )
        self._types = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }
        self._scales: dict[Tensor, dict[str, Tensor]] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        name = "decoupled_grad" if self.use_decoupled_grad else "grad"
        for group in self.param_groups:
            for parameter in group["params"]:
                setattr(parameter, name, None)

    def initialize_state(self, param: Tensor, store_param_remainders: bool = False) -> None:
        """Moments of 0, and the master that the parameter is."""
        for name in self._types if self.master_weights else ("exp_avg", "exp_avg_sq"):
            remainders = self._is_remainder(param, name)
            dtype = torch.int16 if remainders else self._types[name]
            self.state[param][name] = torch.zeros_like(param, dtype=dtype)
            if dtype == torch.float16:
                self._scales.setdefault(param, {})[name] = torch.ones(1)
            if name == "master_param" and not remainders:
                self.set_scaled_state(param, name, param.detach().float())

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        """A state in fp32; remainders as they are."""
        held: Tensor = self.state[param][state_name]
        if held.dtype == torch.float16:
            return held.float() * self._scales[param][state_name]
        return held if self._is_remainder(param, state_name) else held.float()

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """The inverse of :meth:`get_unscaled_state`. In fp16 the largest value becomes half of the
        largest number."""
        held: Tensor = self.state[param][state_name]
        if held.dtype == torch.float16:
            limit = torch.finfo(torch.float16).max / 2
            largest = unscaled_state.abs().amax() if unscaled_state.numel() else torch.ones(())
            scale = self._scales[param][state_name].copy_(largest / limit)
            unscaled_state = torch.where(scale > 0, unscaled_state / scale, 0.0)
        held.copy_(unscaled_state)

    def state_dict(self) -> dict[str, Any]:
        """With states in fp32."""
        result: dict[str, Any] = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        result["state"] = {
            key: {name: self.get_unscaled_state(parameters[key], name) for name in state}
            for key, state in result["state"].items()
        }
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`state_dict` has made it."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        own = (param for group in self.param_groups for param in group["params"])
        parameters = dict(zip(names, own, strict=True))
        for name_of_param, state in state_dict["state"].items():
            param = parameters[name_of_param]
            self.state[param] = {}
            self.initialize_state(param)
            for name, value in state.items():
                self.set_scaled_state(param, name, value)

    @torch.no_grad()
    def step(self, closure: None = None, grad_scaler: None = None) -> None:  # type: ignore[override]
        """One step, computed in fp32."""
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param)
                name = "decoupled_grad" if self.use_decoupled_grad else "grad"
                if (gradient := getattr(param, name, None)) is not None:
                    self._step(param, gradient.float(), group)

    def _step(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        mean = self.get_unscaled_state(param, "exp_avg")
        square = self.get_unscaled_state(param, "exp_avg_sq")
        master = self._master(param)
        (beta1, beta2), t = group["betas"], group["step"]
        corrected = group["bias_correction"]
        first, second = (1 - beta1**t, 1 - beta2**t) if corrected else (1.0, 1.0)
        if not self.adam_w_mode:
            gradient = gradient + group["weight_decay"] * master
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient * gradient
        update = (mean / first) / ((square / second).sqrt() + group["eps"])
        if self.adam_w_mode:
            update = update + group["weight_decay"] * master
        master = master - group["lr"] * update
        if self._is_remainder(param, "master_param"):
            weight, remainder = split(master)
            param.copy_(weight)
            self.state[param]["master_param"].copy_(remainder)
        else:
            param.copy_(master)
            if self._has_master(param):
                self.set_scaled_state(param, "master_param", master)
        self.set_scaled_state(param, "exp_avg", mean)
        self.set_scaled_state(param, "exp_avg_sq", square)

    def _master(self, param: Tensor) -> Tensor:
        if not self._has_master(param):
            return param.detach().float()
        held = self.get_unscaled_state(param, "master_param")
        return joined(param, held) if self._is_remainder(param, "master_param") else held

    def _has_master(self, param: Tensor) -> bool:
        """Whether its master is stepped; that of an fp32 parameter is made, and never is."""
        return self.master_weights and param.dtype != torch.float32

    def _is_remainder(self, param: Tensor, name: str) -> bool:
        is_master = name == "master_param"
        return self.store_param_remainders and is_master and param.dtype == torch.bfloat16


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """fp32 of bf16 weights and the 16 bits that each lacks."""
    high = weight.view(torch.int16) - (remainder < 0).to(torch.int16)
    low = remainder.to(torch.int32) & 0xFFFF
    return ((high.to(torch.int32) << 16) | low).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`joined`: the weight is rounded to nearest, ties away from zero."""
    bits = master.view(torch.int32)
    low = (bits & 0xFFFF).to(torch.int16)
    high = (bits >> 16).to(torch.int16) + (low < 0).to(torch.int16)
    return high.view(torch.bfloat16), low


def stand_in_for_fused_adam() -> None:
    """Have Megatron take it for Transformer Engine's where it is asked for one that is aware of
    precision. This imports Megatron."""
    from megatron.core.optimizer import optimizer_config

    config: Any = optimizer_config.OptimizerConfig
    check = config.__post_init__

    @functools.wraps(check)
    def check_with_engine(self: Any) -> None:
        if not self.use_precision_aware_optimizer:
            check(self)
            return
        use_fused_adam()
        with _engine_to_look_at():
            check(self)

    config.__post_init__ = check_with_engine


def use_fused_adam() -> None:
    """Have it be Megatron's Adam in this process, as where Transformer Engine is installed."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    modules: tuple[Any, ...] = (optimizers, distrib_optimizer, optimizer_config)
    optimizers.Adam = distrib_optimizer.Adam = FusedAdam
    optimizers.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    for module in modules:
        if hasattr(module, "is_te_min_version"):
            module.is_te_min_version = lambda *version, **options: True


@contextmanager
def _engine_to_look_at() -> Iterator[None]:
    """Within it the modules can be imported that Megatron looks for ``FusedAdam`` in."""
    missing = [name for name in _ENGINE if name not in sys.modules]
    for name in missing:
        sys.modules[name] = ModuleType(name)
    vars(sys.modules[_ENGINE[-1]]).setdefault("FusedAdam", FusedAdam)
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
