"""Modes that see every torch call of the process, to the end of its life."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def stay_in(mode: TorchFunctionMode) -> None:
    """Enter a mode for good, backward passes included.

    A mode is off inside of its own ``__torch_function__``, and there ``backward`` runs with all
    that it calls: hooks, the backward methods of a user's own functions, recomputed passes.
    """
    entered: Any = mode
    entered.__enter__()
    autograd: Any = torch.autograd
    run = autograd._engine_run_backward

    def run_in_mode(*args: Any, **kwargs: Any) -> Any:
        with entered:
            return run(*args, **kwargs)

    autograd._engine_run_backward = run_in_mode
