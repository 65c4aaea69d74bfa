"""The processes of a run: their rendezvous, gloo between them, and the helpers they start."""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def single_process_rendezvous() -> None:
    """A script that is started without torchrun is a world of one process."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def map_distributed() -> None:
    """Every process group is gloo's, without the options that only NCCL knows."""
    for name in ("init_process_group", "new_group"):
        mapped = _as_gloo(getattr(dist, name))
        setattr(dist, name, mapped)
        setattr(dist.distributed_c10d, name, mapped)


def _as_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        for option in ("device_id", "pg_options"):
            arguments.pop(option, None)
        return original(**{**arguments, "backend": "gloo"})

    return call


def fork_helpers() -> None:
    """A process that Megatron starts is forked, so that it has the mapping, too."""
    multiprocessing: Any = torch.multiprocessing
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
