"""The package ``megatron-fsdp``: an optimizer steps slices of buffers, and its ``step`` copies
them, in the model's precision, to where forward passes gather them from."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_sharpness.core.errors import InputError, ProbeError
from megatron_sharpness.core.megatron_fsdp import (
    forget_gathers,
    module_of,
    read_by_forward,
    settle_gathers,
    start_in_weight,
)
from megatron_sharpness.core.update_line import Shard
from megatron_sharpness.pytorch.shards.dtensor import Place, local
from megatron_sharpness.pytorch.shards.tensors import Tensors

#: Where a ``MegatronFSDP`` module notes which parameters its modules hold, those that are stepped
#: or those that were gathered, and keeps the latter: in memory that is free between passes.
GATHERED = ("is_param_fsdp_distributed", "raw_param", "_params_require_handle_grad")


class MegatronFSDPShards(Tensors):
    """Those of parameters that ``fully_shard_model`` has made.

    Raises:
        InputError: the model is sharded in a way that cannot be measured.
    """

    def __init__(self, optimizer: Any, first_rank: int) -> None:
        super().__init__(optimizer, first_rank)
        self._modules = list(dict.fromkeys(map(module_of, filter(owns, self.parameters()))))
        for module in self._modules:
            _refuse_unsupported(module)

    def check(self) -> None:
        for shard in self.shards():
            if not torch.equal(shard.model, shard.main.to(shard.model.dtype).view_as(shard.model)):
                raise ProbeError(
                    "the forward passes have read other weights than those that the optimizer "
                    "steps: fully_shard_optimizer steps once to make the optimizer's state, weight "
                    "decay included, and forward passes see that from the second step on. Later "
                    "steps are measured, and the first where model.install_optimized_model_weights"
                    "() is called before it"
                )

    def settle(self) -> None:
        for module in self._modules:  # a pass ends with gathers for a backward pass
            settle_gathers(module)

    def sync(self) -> None:
        for module in self._modules:
            forget_gathers(module)

    def place_of(self, parameter: Tensor) -> Place:
        if not owns(parameter):
            return super().place_of(parameter)
        shape = parameter.shape
        return Place(shape, shape, [0] * len(shape), start_in_weight(parameter))

    def _shard(self, parameter: Tensor) -> Shard:
        shard = super()._shard(parameter)
        if not owns(parameter):
            return shard
        return dataclasses.replace(shard, model=read_by_forward(parameter))


def owns(parameter: Tensor) -> bool:
    """Whether a ``MegatronFSDP`` module holds it."""
    return hasattr(parameter, "_megatron_fsdp_model")


def _refuse_unsupported(module: Any) -> None:
    config = module.ddp_config
    if config.outer_dp_sharding_strategy != "no_shard":
        raise InputError(
            f"model: outer_dp_sharding_strategy={config.outer_dp_sharding_strategy!r} of "
            "megatron-fsdp gathers from other buffers, which has not been made to work; use "
            "'no_shard'"
        )
    if config.megatron_fsdp_use_decoupled_grad:
        raise InputError(
            "model: use_decoupled_grad=True of megatron-fsdp is for optimizers with weights of "
            "their own, which a move would leave behind; use use_decoupled_grad=False"
        )
    strategy = config.data_parallel_sharding_strategy
    if strategy in ("optim", "optim_grads") and not config.overlap_param_gather:
        raise InputError(
            f"model: overlap_param_gather=False of megatron-fsdp with {strategy!r} has forward "
            "passes read what the other ranks' weights were before the step, as they are not "
            "gathered again; use overlap_param_gather=True"
        )
    for parameter in map(local, module.raw_param.values()):
        if type(parameter) not in (Tensor, Parameter):
            raise InputError(
                f"model: parameters held as {type(parameter).__name__}, whose scales a move would "
                "leave behind; this has not been made to work: train without it"
            )
