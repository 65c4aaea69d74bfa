"""Transformer Engine's quantization: what a forward pass changes of it, and how its scales move.

Under delayed scaling a pass leaves the largest absolute values that it has seen (``amax_history``)
behind, and makes the scales of the next one from them. Both lie in objects of Transformer Engine's
that modules hold (``fp8_meta``), and in lists of ``FP8GlobalStateManager`` that hold the same
tensors. The other recipes keep nothing from pass to pass. Read in Transformer Engine 2.6, 2.10,
2.16, 2.18 and 2.20.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import nn

#: The library whose objects hold the state.
LIBRARY = "transformer_engine"

#: Why the first step of a process is not measured.
FIRST_PASS = (
    "Transformer Engine has made its scales in this step's pass, so that there are none from "
    "before to repeat it with; the next step that is due is measured"
)


def _manager() -> Any | None:
    """``FP8GlobalStateManager``, where Transformer Engine is imported."""
    for name in ("quantization", "fp8"):  # the latter before 2.8
        module = sys.modules.get(f"{LIBRARY}.pytorch.{name}")
        if (manager := getattr(module, "FP8GlobalStateManager", None)) is not None:
            return manager
    return None


def is_there() -> bool:
    """Whether Transformer Engine is: without it Megatron trains as if fp8 was not asked for."""
    return any(name.partition(".")[0] == LIBRARY for name in sys.modules)


def quantizes(model: Sequence[Any]) -> bool:
    """Whether the forward passes of this rank's model chunks do."""
    return bool(get_model_config(model[0]).fp8) and _manager() is not None


def weights_type(model: Sequence[Any]) -> torch.dtype | None:
    """In which type quantized forward passes read weights; None where they do not.

    Not all weights are quantized: embeddings and norms are not, so that the noise of the rounding
    is rather too large.
    """
    return torch.float8_e4m3fn if quantizes(model) else None


def shared_state(model: Sequence[Any]) -> dict[str, object]:
    """By name, what a forward pass changes beside the modules; nothing where none quantizes."""
    if not quantizes(model):
        return {}
    manager: Any = _manager()
    # An object from 2.16 on, and attributes of the class before.
    found = {"quantization": getattr(manager, "quantization_state", manager)}
    distributed = sys.modules.get(f"{LIBRARY}.pytorch.distributed")
    # A recomputed pass queues up what its backward pass takes; without one, up to 2.18, it stays.
    recompute = getattr(distributed, "activation_recompute_forward", None)
    return found if recompute is None else {**found, "recompute": recompute}


def not_ready(model: Sequence[Any]) -> list[nn.Module]:
    """Modules that make their state in their first quantized pass, and have not done so."""
    modules = [module for chunk in model for module in chunk.modules()]
    return [module for module in modules if getattr(module, "fp8_initialized", True) is False]


def made_ready(modules: Sequence[nn.Module]) -> bool:
    """Whether any of those that were not has made it since."""
    return any(module.fp8_initialized for module in modules)


class Scales:
    """How delayed scales move in the passes of a step, noted and repeated.

    They move as a pass leaves the outermost quantized region, by a reduction over the ranks, but
    only where gradients are on; and, of zeros, once more for each part that a backward pass
    recomputes, which shifts the history.
    """

    def __init__(self) -> None:
        self._moved_again: list[int] = []  # after each forward pass, before the next one

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Within it a training pass says how often they move."""
        manager = _manager()
        if manager is None:
            yield
            return
        self._moved_again = []
        move = manager.reduce_and_update_fp8_tensors

        def move_and_note(forward: bool = True) -> None:
            in_backward = torch._C._current_graph_task_id() != -1
            if forward and not in_backward:
                self._moved_again.append(0)
            elif forward and self._moved_again:
                self._moved_again[-1] += 1
            move(forward=forward)

        with _replaced(manager, "reduce_and_update_fp8_tensors", move_and_note):
            yield

    @contextlib.contextmanager
    def repeated(self) -> Iterator[None]:
        """Within it they move in passes without gradients as often."""
        manager = _manager()
        if manager is None:
            yield
            return
        move = manager.reduce_and_update_fp8_tensors
        again = iter(self._moved_again)

        def move_as_noted(forward: bool = True) -> None:
            for _ in range(1 + next(again, 0)):
                move(forward=forward)

        # It was ``fp8_autocast_exit`` before 2.8.
        name = "autocast_exit" if hasattr(manager, "autocast_exit") else "fp8_autocast_exit"
        leave = getattr(manager, name)

        def leave_with_gradients(*args: Any, **kwargs: Any) -> None:
            with torch.enable_grad():
                leave(*args, **kwargs)

        with (
            _replaced(manager, "reduce_and_update_fp8_tensors", move_as_noted),
            _replaced(manager, name, leave_with_gradients),
        ):
            yield


@contextlib.contextmanager
def _replaced(owner: type, name: str, function: Any) -> Iterator[None]:
    """A class method, for a while."""
    original = vars(owner)[name]
    setattr(owner, name, staticmethod(function))
    try:
        yield
    finally:
        setattr(owner, name, original)
