"""CUDA graphs on the CPU: what was captured runs again, operation by operation, without Python.

Megatron's own wrappers capture and replay. A capture notes the operations that PyTorch dispatches,
with the very tensors that they read and write; a replay makes them anew and writes what they give
into the same memory.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import full_cuda_graph
from megatron.core.tensor_parallel import random as random_states
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import training
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.has_run = False

    def register_generator_state(self, state: object) -> None: ...

    def reset(self) -> None: ...

    @torch.no_grad()
    def replay(self) -> None:
        if self.has_run:
            self.has_run = False
            return
        for function, args, kwargs, given in self.operations:
            made = function(*args, **kwargs)
            for old, new in zip(tree_leaves(given), tree_leaves(made), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


class Capture(TorchDispatchMode):
    """``torch.cuda.graph``."""

    capturing = False

    def __init__(self, graph: Graph, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.graph = graph
        # Here a capture runs what it captures. Those of a whole iteration, which are given a
        # stream, are replayed at once.
        graph.has_run = "stream" in kwargs

    def __enter__(self) -> Any:
        Capture.capturing = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Capture.capturing = False
        super().__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.graph.operations.append((function, args, kwargs or {}, result))
        return result


def install() -> None:
    """Capture and replay on the CPU."""
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph = Graph, Capture
    cuda.graph_pool_handle = lambda: (0, 0)
    cuda.is_current_stream_capturing = lambda: Capture.capturing
    # Random states of the host are tensors, whether graphs are used or not.
    read, write = random_states._get_cuda_rng_state, random_states._set_cuda_rng_state
    random_states._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: read()
    random_states._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: write(state)
    random_states.convert_cuda_rng_state = lambda state, to_graphable=False: state
    add = random_states.CudaRNGStatesTracker.add

    def add_tensor(self: Any, name: str, seed: int) -> None:
        graphs, self.use_cudagraphable_rng = self.use_cudagraphable_rng, False
        add(self, name, seed)
        self.use_cudagraphable_rng = graphs

    random_states.CudaRNGStatesTracker.add = add_tensor
    full_cuda_graph.get_all_rng_states = cuda_graphs.get_all_rng_states = dict
    cuda_graphs.alloc_tensor_from_graph_mempool = lambda meta: meta.zeros_like()
    cuda_graphs._ensure_generator_state_is_cudagraph_safe = lambda generator: None
    training.TECudaGraphHelper = LayerGraphs
    plain = GraphableMegatronModule._get_te_cuda_graph_replay_args
    TransformerLayer._get_te_cuda_graph_replay_args = plain  # its own asks for Transformer Engine


class LayerGraphs:
    """In the place of ``TECudaGraphHelper``: each layer's graphs are itself, with gradients."""

    replays = 0

    def __init__(self, model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        self.layers = [
            layer
            for chunk in model
            for layer in chunk.modules()
            if isinstance(layer, TransformerLayer)
        ]
        self.finished = False

    def capture_finished(self) -> bool:
        return self.finished

    def graphs_created(self) -> bool:
        return self.finished

    def create_cudagraphs(self) -> None:
        self.finished = True
        for layer in self.layers:
            layer.cuda_graphs = [_graph_of(layer)]

    def cuda_graph_set_manual_hooks(self) -> None: ...

    def delete_cuda_graphs(self) -> None:
        print(f"layers' graphs were replayed {LayerGraphs.replays} times", flush=True)


def _graph_of(layer: Any) -> Any:
    def replay(*args: Any, is_first_microbatch: bool, **kwargs: Any) -> Any:
        assert torch.is_grad_enabled(), "a graph of a training pass was replayed by a probe"
        LayerGraphs.replays += 1
        return layer._te_cuda_graph_capture(*args, **kwargs)

    return replay
