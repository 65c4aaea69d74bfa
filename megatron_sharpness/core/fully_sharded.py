"""PyTorch's FSDP2: a forward pass gathers the parameters, and may keep them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class FullyShardedModules:
    """The outermost modules of a model that ``fully_shard`` has made, if any.

    Args:
        model: as it is called in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._roots: list[FSDPModule] = []
        inner: set[nn.Module] = set()
        for module in model.modules():
            if isinstance(module, FSDPModule) and module not in inner:
                self._roots.append(module)
                inner.update(module.modules())

    def sync(self) -> None:
        """Have the next forward pass gather all weights anew."""
        for root in self._roots:
            _reshard(root)
            if (stream := _stream(root)) is not None:
                # Where a loop has set such an event, gathers wait for it and for nothing else.
                root.set_post_optim_event(stream.record_event())


def _reshard(root: FSDPModule) -> None:
    """After a pass without gradients a root keeps those that it gathered."""
    if hasattr(root, "reset_iter_state"):  # from torch 2.13 on
        # Forgets a gather in flight too, and where in the pass an exception struck.
        root.reset_iter_state()
        return
    assert isinstance(root, nn.Module)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _stream(root: FSDPModule) -> Any:
    """The stream on which the shards of an FSDP2 module are written, or None on the CPU."""
    assert isinstance(root, nn.Module)
    parameter = next((p for p in root.parameters() if isinstance(p, DTensor)), None)
    if parameter is None or parameter.device_mesh.device_type == "cpu":
        return None
    return torch.get_device_module(parameter.device_mesh.device_type).current_stream()
