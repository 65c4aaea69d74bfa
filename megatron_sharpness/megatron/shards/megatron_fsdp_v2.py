"""The second version of Megatron-FSDP, which keeps nothing gathered between passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_sharpness.megatron.shards.gathers import Gathers, Stepped

_GROUP = "_mfsdp_parameter_group"


def owns(optimizer: Any) -> bool:
    """Whether it steps parameters of a ``FullyShardedDataParallelV2``."""
    return any(hasattr(parameter, _GROUP) for parameter in optimizer.get_parameters())


def stepped(optimizer: Any) -> Iterator[Stepped]:
    """What each rank steps is its slice of a group's main weights."""
    for parameter in optimizer.get_parameters():
        group = getattr(parameter, _GROUP)()
        index = [held.sharded is parameter for held in group.fsdp_parameters].index(True)
        gradient = parameter.grad
        yield Stepped(
            parameter=parameter,
            main=parameter._local_tensor.detach(),
            model=group.model_weight.get_local_tensor(index).detach(),  # each step makes a new one
            gradient=None if gradient is None else gradient._local_tensor,
            # In another precision it is a copy that was clipped, and that is gone.
            clipped=gradient is None or gradient.dtype == parameter.dtype,
            start=getattr(group.main_weight._get_owned_range(index), "tensor_relative_offset", 0),
        )


def gathers(model: Sequence[Any], optimizer: Any) -> list[Gathers]:
    """Those of the chunks that it shards."""
    units = [
        module
        for chunk in model
        if type(chunk).__name__ == "FullyShardedDataParallelV2"
        for module in chunk.module.modules()
        if hasattr(module, "_unshard_event")
    ]
    return [_UnitGathers(units)] if units else []


class _UnitGathers(Gathers):
    """Each pass gathers a unit and gives it back, but for one that broke off."""

    def __init__(self, units: Sequence[Any]) -> None:
        self._units = units

    def sync(self) -> None:
        for unit in self._units:
            if unit._unshard_event is not None:
                unit._reshard_parameter_groups()
                unit._phase = type(unit).Phase.RESTING

    put_account_back = sync
