"""A tensor that every rank holds whole, or a part of: a DTensor, as FSDP2 and tensor parallelism
make them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def holds_first_copy(parameter: Tensor, first_rank: int) -> bool:
    """Whether, of the equal copies that several ranks hold, this rank's is the one to count.

    Args:
        parameter: whole, or a DTensor.
        first_rank: the lowest of the ranks that hold it.
    """
    if not dist.is_initialized():
        return True
    if not isinstance(parameter, DTensor):
        return dist.get_rank() == first_rank
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    return (
        coordinate is not None
        and bool((mesh.mesh == first_rank).any())  # outside of its mesh there are copies only
        and not any(
            index
            for index, placement in zip(coordinate, parameter.placements, strict=True)
            if isinstance(placement, Replicate)
        )
    )


def local_gradient(parameter: Tensor) -> Tensor | None:
    """The gradient of what :func:`local` gives."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        # Of a replicated parameter it may still be a partial sum, as under sequence parallelism.
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return None if gradient is None else local(gradient)
