"""The distributed optimizer whose main parameters are the inner optimizer's own
(``--use-precision-aware-optimizer``): in the states of Transformer Engine's ``FusedAdam``, or, with
``--optimizer-cpu-offload``, copies of which a part lies on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_sharpness.megatron.shards import parameter_buffers
from megatron_sharpness.megatron.shards.gathers import Stepped

_MASTER = "master_param"


def owns(optimizer: Any) -> bool:
    """Whether it is a ``DistributedOptimizer`` that has no main parameters."""
    config = getattr(optimizer, "config", None)
    kept_inside = getattr(config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False)
    return parameter_buffers.owns(optimizer) and bool(kept_inside)


def stepped(optimizer: Any) -> Iterator[Stepped]:
    """The shards that the optimizer has in its groups, and what it steps in their place."""
    inner = optimizer.optimizer
    for owner_groups, model_groups in (
        (optimizer.shard_float16_groups, optimizer.model_float16_groups),
        (optimizer.shard_fp32_groups, optimizer.model_fp32_groups),
    ):
        for owners, models in zip(owner_groups, model_groups, strict=True):
            for owner, model in zip(owners, models, strict=True):
                held = parameter_buffers.slice_of_buffer(optimizer, model)
                start = optimizer._get_model_param_range_map(model)["param"].start
                yield _stepped(inner, owner, held)._replace(weight=model, start=start)


def _stepped(inner: Any, owner: Tensor, model: Tensor) -> Stepped:
    gradient = getattr(owner, "decoupled_grad", None)
    if hasattr(inner, "param_to_inner_param"):  # a HybridDeviceOptimizer: loading makes a new map
        return Stepped(owner, inner.param_to_inner_param[owner], model, gradient)
    if owner.dtype == torch.float32:  # it has a master that is made, and never stepped
        return Stepped(owner, owner, model, gradient)
    held = inner.state.get(owner, {}).get(_MASTER)
    if held is not None and held.dtype == torch.float32:
        return Stepped(owner, held, model, gradient)
    return Stepped(owner, owner, model, gradient, packed=_Master(inner, owner, model, held))


class _Master:
    """A master parameter before the first step has made it from the weight; in fp16, scaled; or of
    which the upper half is the weight itself (``store_param_remainders``)."""

    def __init__(self, inner: Any, owner: Tensor, model: Tensor, held: Tensor | None) -> None:
        self._inner = inner
        self._owner = owner
        self._model = model
        self._held = held

    def unpack(self) -> Tensor:
        if self._held is None:
            return self._model.detach().float()
        if self._held.dtype == torch.int16:
            return _joined(self._model.detach(), self._held)
        unscaled: Tensor = self._inner.get_unscaled_state(self._owner, _MASTER)
        return unscaled.detach()

    def pack(self, values: Tensor) -> None:
        assert self._held is not None, "a step has made it"
        if self._held.dtype == torch.int16:
            self._held.copy_((values.view(torch.int32) & 0xFFFF).to(torch.int16))
        else:
            self._inner.set_scaled_state(self._owner, _MASTER, values)


def _joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """fp32 of bf16 weights and the 16 bits that each lacks: the weight is rounded to nearest, ties
    away from zero, so that a remainder below zero has carried one into it (adam.cu)."""
    upper = weight.view(torch.int16) - (remainder < 0).to(torch.int16)
    lower = remainder.to(torch.int32) & 0xFFFF
    return ((upper.to(torch.int32) << 16) | lower).view(torch.float32)
