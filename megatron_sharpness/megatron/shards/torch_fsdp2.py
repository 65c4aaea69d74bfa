"""PyTorch's FSDP2 in Megatron (``--use-torch-fsdp2``): parameters are DTensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_sharpness.core.fully_sharded import FullyShardedModules
from megatron_sharpness.megatron.shards import replicated
from megatron_sharpness.megatron.shards.gathers import Gathers, Stepped


def owns(optimizer: Any) -> bool:
    """Whether it steps DTensors of FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in optimizer.get_parameters())


def stepped(optimizer: Any) -> Iterator[Stepped]:
    """What :mod:`replicated` says, of the part that each rank has."""
    for whole in replicated.stepped(optimizer):
        yield whole._replace(
            main=_local(whole.main),
            model=_local(whole.model),
            gradient=None if whole.gradient is None else _local(whole.gradient),
            start=_start(whole.main),
        )


def sharded_over(optimizer: Any) -> Sequence[Any]:
    """Groups of ranks beside those that Megatron sums the gradient norm over: it adds the parts up
    when it takes a parameter's own norm."""
    parameter = next(p for p in optimizer.get_parameters() if isinstance(p, DTensor))
    return (parameter.device_mesh.get_group(),)


def gathers(model: Sequence[Any], optimizer: Any) -> list[Gathers]:
    """Those of the chunks that FSDP2 shards."""
    inner = [getattr(chunk, "module", None) for chunk in model]
    return [_PassGathers(module) for module in inner if isinstance(module, FSDPModule)]


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _start(tensor: Tensor) -> int:
    """Where the rows begin that this rank has, in elements."""
    if not isinstance(tensor, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return int(offset[0]) * math.prod(tensor.shape[1:]) if offset else 0


class _PassGathers(Gathers):
    def __init__(self, module: Any) -> None:
        self._modules = FullyShardedModules(module)

    def sync(self) -> None:
        self._modules.sync()

    put_account_back = sync
