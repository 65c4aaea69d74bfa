"""The processes of a run: their rendezvous, gloo between them, and the helpers they start."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

#: Stores of this process, for as long as it lives.
_SERVED: list[Any] = []


def single_process_rendezvous() -> None:
    """A script that is started without torchrun is a world of one process."""
    if "RANK" in os.environ:
        return
    # As torchrun's agent: a port that is bound at once cannot become another's before it is used.
    distributed: Any = dist
    _SERVED.append(distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(_SERVED[-1].port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )


def map_distributed() -> None:
    """Every process group is gloo's, without the options that only NCCL knows."""
    for name in ("init_process_group", "new_group"):
        mapped = _as_gloo(getattr(dist, name))
        setattr(dist, name, mapped)
        setattr(dist.distributed_c10d, name, mapped)
    _gather_uneven_parts()
    _meshes_of_cpus()


def _as_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        for option in ("device_id", "pg_options"):
            arguments.pop(option, None)
        return original(**{**arguments, "backend": "gloo"})

    return call


class _Done:
    """A collective that is over."""

    def wait(self) -> bool:
        return True


def _gather_uneven_parts() -> None:
    """Gloo gathers parts of one size only, NCCL any: here they are filled up to the largest."""
    distributed: Any = dist
    gather = distributed.all_gather

    def all_gather(
        parts: list[torch.Tensor], part: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        sizes = [each.numel() for each in parts]
        if len(set(sizes)) == 1:
            return gather(parts, part, group, async_op)
        filled = [part.new_zeros(max(sizes)) for _ in parts]
        own = part.new_zeros(max(sizes))
        own[: part.numel()] = part.flatten()
        gather(filled, own, group)
        for each, whole in zip(parts, filled, strict=True):
            each.copy_(whole[: each.numel()].view_as(each))
        return _Done() if async_op else None

    distributed.all_gather = all_gather


def _meshes_of_cpus() -> None:
    mesh: Any = DeviceMesh
    make = mesh.__init__

    @functools.wraps(make)
    def make_on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        make(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    mesh.__init__ = make_on_cpu


def fork_helpers() -> None:
    """A process that Megatron starts is forked, so that it has the mapping, too."""
    multiprocessing: Any = torch.multiprocessing
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
