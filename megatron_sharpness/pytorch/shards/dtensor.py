"""A tensor that every rank holds whole, or a part of: a DTensor, as FSDP2 and tensor parallelism
make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class Place(NamedTuple):
    """Where in a tensor of the model a run of elements lies that a rank has.

    Attributes:
        shape: of the whole tensor.
        block: shape of the part of it that the run lies in.
        offset: where the block begins.
        start: where in the flattened block the run begins.
    """

    shape: Sequence[int]
    block: Sequence[int]
    offset: Sequence[int]
    start: int = 0


def place_of(tensor: Tensor) -> Place:
    """That of what :func:`local` gives."""
    if not isinstance(tensor, DTensor):
        return Place(tensor.shape, tensor.shape, [0] * tensor.dim())
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Place(tensor.shape, local(tensor).shape, offset)


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
