"""CUDA graphs: probes run kernel by kernel, beside them.

A graph replays what it has captured: with the number of micro-batches and the gradients of
training, and without Python. Neither may a probe be captured. Read in megatron-core 0.16.1, 0.17.1,
0.19.0 and 0.20.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.transformer.cuda_graphs import CudaGraphManager
from megatron.core.transformer.module import GraphableMegatronModule, MegatronModule
from megatron.core.utils import get_model_config

#: What is replaced: owner, attribute, value.
Switch = tuple[Any, str, Any]


def by_kernels(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward_backward_func`` without the graph of the full iteration around it.

    Its graph of forward passes is the evaluation's, with that one's number of micro-batches.
    """
    while True:
        if isinstance(schedule, FullCudaGraphWrapper):
            schedule = schedule.forward_backward_func
        elif isinstance(schedule, NotedSchedule):
            schedule = schedule.schedule
        else:
            return schedule


def holders(model: Sequence[Any]) -> list[object]:
    """What holds the graphs of layers, with activations of training and views of weights: nothing
    that a pass beside them changes, and nothing to keep a copy of."""
    modules = [module for chunk in model for module in chunk.modules()]
    managers = [module for module in modules if isinstance(module, CudaGraphManager)]
    return [*managers, *(m.cuda_graphs for m in modules if hasattr(m, "cuda_graphs"))]


def switches(model: Sequence[Any]) -> list[Switch]:
    """What makes a pass call no graph of a layer, and record none."""
    config = get_model_config(model[0])
    found: list[Switch] = [
        (CudaGraphManager, "__call__", _call_without_graph),
        (GraphableMegatronModule, "_should_call_te_cudagraph", _no_graph),
    ]
    if getattr(config, "cuda_graph_impl", "none") == "none" or not config.fp8:
        return found
    # Captured kernels write quantized weights into this memory, which a pass may put another into
    # the place of.
    modules = [module for chunk in model for module in chunk.modules()]
    return found + [(m, "_fp8_workspaces", {}) for m in modules if hasattr(m, "_fp8_workspaces")]


def _call_without_graph(
    self: Any, module: Any, args: Any, kwargs: Any, cache_key: Any = None
) -> Any:
    """As ``CudaGraphManager.__call__`` itself where it has no graph for an evaluation."""
    self.is_first_microbatch = False
    if self.func is not None:
        return self.func(*args, **kwargs)
    return super(MegatronModule, module).__call__(*args, **kwargs)


def _no_graph(self: Any, *args: Any, **kwargs: Any) -> bool:
    return False


class NotedSchedule:
    """What is captured as a full iteration, keeping the losses of the micro-batches.

    A replay writes the losses of its step into the tensors that the capture has left here.

    Args:
        schedule: the real ``forward_backward_func``.
        noting: makes of a ``forward_step_func`` one that notes its losses in a list.
    """

    def __init__(self, schedule: Callable[..., Any], noting: Callable[..., Any]) -> None:
        self.schedule = schedule
        self.losses: list[Any] = []
        self._noting = noting

    def __call__(self, **kwargs: Any) -> Any:
        self.losses = []
        step = self._noting(kwargs["forward_step_func"], self.losses)
        return self.schedule(**{**kwargs, "forward_step_func": step})


def note_losses(
    schedule: Callable[..., Any], noting: Callable[..., Any]
) -> NotedSchedule | None:
    """What keeps the losses of a full iteration's graph; put into it once, before the capture.

    Returns:
        It, or None where no full iteration is captured.
    """
    if not isinstance(schedule, FullCudaGraphWrapper):
        return None
    if not isinstance(schedule.forward_backward_func, NotedSchedule):
        schedule.forward_backward_func = NotedSchedule(schedule.forward_backward_func, noting)
    return schedule.forward_backward_func
