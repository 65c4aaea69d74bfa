"""What cannot be measured with, refused before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from megatron_sharpness.core.errors import InputError, SettingError
from megatron_sharpness.core.settings import check_names
from megatron_sharpness.pytorch.shards import deepspeed, local, shards_of


def optimizers_in(given: Any) -> list[Optimizer]:
    """One optimizer, or those of a sequence.

    Raises:
        InputError: it is neither.
    """
    if isinstance(given, Optimizer) or deepspeed.owns(given):
        return [given]
    try:
        return list(given)
    except TypeError:
        raise InputError(
            f"optimizer: {type(given).__name__} is not a torch.optim.Optimizer, whose step can be "
            "observed; give the optimizers that it holds"
        ) from None


def losses_by_name(given: Any) -> dict[str, Any]:
    """The losses on other data.

    Raises:
        SettingError: it is no dictionary of functions, by names that tags can have.
    """
    if not isinstance(given, Mapping):
        raise SettingError("losses", given, "give a dictionary of functions by name")
    check_names(given)
    for name, function in given.items():
        if not callable(function):
            raise SettingError("losses", name, f"{function!r} is no function; give one")
    return dict(given)


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of accelerate's, which steps it where it steps at all."""
    while type(optimizer).__module__ in ("accelerate.optimizer", "accelerate.utils.deepspeed"):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def refuse_unsupported(
    model: nn.Module, optimizers: Sequence[Optimizer], *, mode: str, offload: str
) -> None:
    """Raise where a measurement would be wrong or impossible.

    Raises:
        InputError: the message says what it is, why, and what to do instead.
    """
    if mode not in ("train", "eval"):
        raise SettingError("mode", mode, "give 'train' or 'eval'")
    if offload not in ("none", "cpu"):
        raise SettingError("offload", offload, "give 'none' or 'cpu'")
    if deepspeed.is_engine(model):
        deepspeed.refuse_engine(model, optimizers)
    elif any(map(deepspeed.owns, optimizers)):
        raise InputError(
            "model: the optimizer is a DeepSpeed engine's, and the model is not; give the engine "
            "that deepspeed.initialize has returned, as the loop calls it"
        )
    seen: set[Tensor] = set()
    for optimizer in optimizers:
        _refuse_optimizer(optimizer)
        parameters = shards_of(optimizer).parameters()
        if seen.intersection(parameters):
            raise InputError(
                "optimizer: two of the optimizers step the same parameter, so that there is no one "
                "update to follow; give each parameter to one optimizer"
            )
        seen.update(parameters)
        for parameter in parameters:
            _refuse_parameter(parameter)
    if not seen and not any(isinstance(entry, ZeroRedundancyOptimizer) for entry in optimizers):
        raise InputError(
            "optimizer: it steps no parameter that requires a gradient; give the optimizer that "
            "trains the model"
        )
    for module in model.modules():
        if (
            isinstance(module, FullyShardedDataParallel)
            and module.sharding_strategy != ShardingStrategy.NO_SHARD
        ):
            raise InputError(
                f"model: FullyShardedDataParallel with {module.sharding_strategy.name} keeps the "
                "gathered weights of its root after a forward pass without gradients, and offers "
                "no way to gather them again; use fully_shard (FSDP2), or NO_SHARD"
            )


def _refuse_optimizer(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer) and not deepspeed.owns(optimizer):
        raise InputError(
            f"optimizer: {name} is not a torch.optim.Optimizer, whose step can be observed; give "
            "the optimizers that it holds"
        )
    if isinstance(optimizer, LBFGS):
        raise InputError(
            "optimizer: LBFGS searches its own step, so that no learning rate belongs to its "
            "update; use a first-order optimizer"
        )
    if isinstance(optimizer, PostLocalSGDOptimizer):
        raise InputError(
            "optimizer: PostLocalSGDOptimizer averages the weights of the ranks now and then, and "
            "in between each rank has weights of its own, so that there is no one θ; train with "
            "DDP's own averaging of gradients"
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise InputError(
            "optimizer: ZeroRedundancyOptimizer with overlap_with_ddp=True steps outside of "
            "step(); use overlap_with_ddp=False"
        )
    for group in optimizer.param_groups:
        if not isinstance(group.get("lr"), (int, float, Tensor)):
            raise InputError(
                f"optimizer: {name} has a parameter group with lr={group.get('lr')!r}, so that its "
                "update belongs to no learning rate; give it one, for example relative_step=False"
            )


def _refuse_parameter(parameter: Tensor) -> None:
    if is_lazy(parameter) or parameter.is_meta:
        raise InputError(
            "model: parameters on the meta device, or of lazy modules; make CriticalSharpness "
            "after they have their values"
        )
    if type(local(parameter)) not in (Tensor, Parameter):
        raise InputError(
            f"model: parameters held as {type(local(parameter)).__name__}, whose scales a move "
            "would leave behind; this has not been made to work: train without it"
        )
