"""A hash over whatever training has changed, bit by bit for tensors."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def hash_of(*values: Any) -> str:
    """Of tensors (of DTensors this rank's shard) in nested containers and iterators, and whatever
    else has a ``repr``."""
    sha = hashlib.sha256()
    _add(sha, values)
    return sha.hexdigest()[:16]


def random_states() -> str:
    """Of Python's, NumPy's and PyTorch's random states on the host."""
    return hash_of(random.getstate(), np.random.get_state(), torch.get_rng_state())


def _add(sha: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        local = value.to_local() if isinstance(value, DTensor) else value
        if is_traceable_wrapper_subclass(local):
            _add(sha, [getattr(local, name) for name in local.__tensor_flatten__()[0]])
            return
        flat = local.detach().contiguous().cpu().reshape(-1)
        sha.update(str((local.dtype, tuple(local.shape))).encode())
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            _add(sha, (str(key), value[key]))
    elif isinstance(value, (list, tuple, Iterator)):
        for item in value:
            _add(sha, item)
    elif isinstance(value, np.ndarray):
        sha.update(value.tobytes())
    else:
        sha.update(repr(value).encode())
