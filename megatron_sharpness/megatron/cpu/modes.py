"""Modes that see every torch call of the process, to the end of its life."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Mode(TorchFunctionMode):
    """What is made of a torch call; here the call itself."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.call(func, args, kwargs or {})


def stay_in(mode: Mode) -> None:
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
