"""Megatron-FSDP: parameters are DTensors of buffers that passes gather bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_sharpness.core.megatron_fsdp import (
    forget_gathers,
    is_sharded,
    read_by_forward,
    settle_gathers,
    start_in_weight,
)
from megatron_sharpness.megatron.shards.gathers import Gathers, Stepped


def owns(optimizer: Any) -> bool:
    """Whether it is the ``DistributedOptimizer`` of a model that Megatron-FSDP shards."""
    return bool(getattr(getattr(optimizer, "ddp_config", None), "use_megatron_fsdp", False))


def stepped(optimizer: Any) -> Iterator[Stepped]:
    """What each rank steps is a slice of a main buffer, or of the model's own."""
    for parameter in optimizer.get_parameters():
        gradient = getattr(parameter, "decoupled_grad", None)  # --use-precision-aware-optimizer
        gradient = parameter.grad if gradient is None else gradient
        yield Stepped(
            parameter=parameter,
            main=parameter._local_tensor.detach(),
            model=read_by_forward(parameter),
            gradient=None if gradient is None else gradient._local_tensor,
            weight=parameter.orig_param,
            start=start_in_weight(parameter),
        )


def gathers(model: Sequence[Any], optimizer: Any) -> list[Gathers]:
    """Those of the chunks that Megatron-FSDP shards; ``no_shard`` gathers nothing."""
    inner: list[Any] = [getattr(chunk, "module", None) for chunk in model]
    return [
        _BucketGathers(module)
        for module in inner
        if is_sharded(module) and module.data_parallel_sharding_strategy != "no_shard"
    ]


def unwrapped(chunk: Any) -> Any:
    """The module in a model chunk, without Megatron-FSDP's own, which says how its weights are."""
    inner = chunk.module
    return inner.module if is_sharded(inner) else inner


class _BucketGathers(Gathers):
    """The gathers of a ``MegatronFSDP`` module, bucket by bucket."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def scratch(self) -> list[object]:
        buffer = self._module.param_and_grad_buffer
        return [
            buffer.weight_alloc,
            *(
                parameter
                for group in buffer.parameter_groups
                if group.model_weight_buffer and group.model_weight_buffer.is_data_distributed
                for parameter in group.params
            ),
        ]

    def settle(self) -> None:
        settle_gathers(self._module)

    finish = settle  # a pass ends with gathers for a backward pass

    def sync(self) -> None:
        forget_gathers(self._module)
        # Not Megatron's argument: --overlap-param-gather may have been switched off by itself.
        if not self._module.ddp_config.overlap_param_gather:
            self._module.start_param_sync(force_sync=True)

    def put_account_back(self) -> None:
        forget_gathers(self._module)
        self._module.start_param_sync()  # as the optimizer has left it
