"""Transformer Engine's fp8, emulated in Megatron's local layers on the CPU.

What a measurement touches has Transformer Engine's names and its behaviour of 2.20: the global
state, its autocast and when scales move, what a module keeps, and what a recomputed pass queues up.
Numbers are rounded to e4m3 and back, in the forward pass.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from megatron.core import mpu, recompute, tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

LARGEST = 448.0  # of e4m3
HISTORY = 4


@dataclass(slots=True)
class FP8GlobalState:
    fp8_enabled: bool = False
    is_first_fp8_module: bool = False
    autocast_depth: int = 0
    global_amax_history_buffer: list[Any] = field(default_factory=list)
    global_scale_buffer: list[Any] = field(default_factory=list)
    fp8_tensors_recompute_buffer: list[Any] = field(default_factory=list)


class FP8GlobalStateManager:
    quantization_state: Any = FP8GlobalState()

    @classmethod
    def state(cls) -> Any:
        return getattr(cls, "quantization_state", cls)

    @classmethod
    def autocast_enter(cls) -> None:
        state = cls.state()
        state.fp8_enabled = True
        state.is_first_fp8_module |= state.autocast_depth == 0
        state.autocast_depth += 1

    @classmethod
    def autocast_exit(cls, enabled: bool, _graph: bool) -> None:
        state = cls.state()
        state.autocast_depth -= 1
        if enabled and state.autocast_depth == 0 and not _graph and torch.is_grad_enabled():
            cls.reduce_and_update_fp8_tensors(forward=True)

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None:
        state = cls.state()
        if not forward or not state.global_scale_buffer:
            return
        amaxes = torch.cat([history[0] for history in state.global_amax_history_buffer])
        group = mpu.get_amax_reduction_group(with_context_parallel=True)
        torch.distributed.all_reduce(amaxes, op=torch.distributed.ReduceOp.MAX, group=group)
        parts = amaxes.split([len(scale) for scale in state.global_scale_buffer])
        for amax, history, scale in zip(
            parts, state.global_amax_history_buffer, state.global_scale_buffer, strict=True
        ):
            history[0].copy_(amax)
            largest = history.amax(0)
            scale.copy_(torch.where(largest > 0, LARGEST / largest, scale))
            history.copy_(torch.roll(history, -1, 0))
            history[0].zero_()


class DelayedScalingRecipeState:
    def __init__(self) -> None:
        self.scale = torch.ones(2)
        self.amax_history = torch.zeros(HISTORY, 2)


class activation_recompute_forward:
    """Of 2.18 and before: without gradients what it queues up stays."""

    _is_first_fp8_module: list[bool] = []  # noqa: RUF012
    phase: int | None = None

    def __init__(self, recompute_phase: bool) -> None:
        self.recomputes = recompute_phase

    def __enter__(self) -> None:
        kind, state = activation_recompute_forward, FP8GlobalStateManager.state()
        kind.phase = 2 if self.recomputes else 1
        if self.recomputes:
            state.is_first_fp8_module = kind._is_first_fp8_module.pop(0)
        else:
            kind._is_first_fp8_module.append(state.is_first_fp8_module)

    def __exit__(self, *error: object) -> None:
        activation_recompute_forward.phase = None


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    state = FP8GlobalStateManager.state()
    before = state.fp8_enabled, state.is_first_fp8_module
    FP8GlobalStateManager.autocast_enter()
    try:
        yield
    finally:
        state.fp8_enabled, state.is_first_fp8_module = before
        FP8GlobalStateManager.autocast_exit(True, _graph=False)


def checkpoint(function: Any, distribute: bool, tracker: Any, group: Any, *inputs: Any) -> Any:
    passes = 0

    def run(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        region = autocast() if passes > 1 else contextlib.nullcontext()
        with activation_recompute_forward(passes > 1), region:
            return function(*given)

    return tensor_parallel.checkpoint(run, distribute, *inputs)


class Rounded(torch.autograd.Function):
    """To e4m3 and back; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        scaled = (x.float() * scale).clamp(-LARGEST, LARGEST)
        return (scaled.to(torch.float8_e4m3fn).float() / scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return gradients[0], None


class Delayed:
    """Scales from the passes before."""

    @staticmethod
    def begin(module: Any) -> None:
        phase, state = activation_recompute_forward.phase, FP8GlobalStateManager.state()
        meta = module.fp8_meta
        if phase == 2:
            scaling = meta["scaling_fwd"]
            meta["updated"] = scaling.amax_history.clone(), scaling.scale.clone()
            Delayed._set(scaling, state.fp8_tensors_recompute_buffer[meta["position"]].popleft())
            return
        if not module.fp8_initialized:
            module.fp8_initialized = True
            meta["scaling_fwd"] = DelayedScalingRecipeState()
            state.global_amax_history_buffer.append(meta["scaling_fwd"].amax_history)
            state.global_scale_buffer.append(meta["scaling_fwd"].scale)
        if phase == 1:
            scaling = meta["scaling_fwd"]
            if "position" not in meta:
                meta["position"] = len(state.fp8_tensors_recompute_buffer)
                state.fp8_tensors_recompute_buffer.append(deque())
            state.fp8_tensors_recompute_buffer[meta["position"]].append(
                [scaling.amax_history.clone(), scaling.scale.clone()]
            )

    @staticmethod
    def end(module: Any) -> None:
        if activation_recompute_forward.phase == 2:
            Delayed._set(module.fp8_meta["scaling_fwd"], module.fp8_meta["updated"])

    @staticmethod
    def _set(scaling: Any, kept: Any) -> None:
        scaling.amax_history.copy_(kept[0])
        scaling.scale.copy_(kept[1])

    @staticmethod
    def scale(module: Any, x: Tensor, index: int) -> Tensor:
        scaling = module.fp8_meta["scaling_fwd"]
        seen = scaling.amax_history[0, index]
        seen.copy_(torch.maximum(seen, x.detach().abs().max().float()))
        return scaling.scale[index].clone()


class Tensorwise:
    """Scales of what is cast: nothing is kept."""

    @staticmethod
    def begin(module: Any) -> None:
        module.fp8_initialized = True

    @staticmethod
    def end(module: Any) -> None: ...

    @staticmethod
    def scale(module: Any, x: Tensor, index: int) -> Tensor:
        return LARGEST / x.detach().abs().max().float()


def _quantize(kind: Any, recipe: Any) -> None:
    make, run = kind.__init__, kind.forward

    @functools.wraps(make)
    def make_with_state(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.fp8_initialized, self.is_first_microbatch = False, True
        self.fp8_meta, self._fp8_workspaces = {}, {}

    @functools.wraps(run)
    def run_quantized(
        self: Any, x: Tensor, weight: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not FP8GlobalStateManager.state().fp8_enabled:
            return run(self, x, weight, *args, **kwargs) if weight is not None else run(self, x)
        recipe.begin(self)
        rounded = Rounded.apply(x, recipe.scale(self, x, 0))
        if self.is_first_microbatch:
            scale = recipe.scale(self, self.weight, 1)
            self._fp8_workspaces["weight"] = Rounded.apply(self.weight.detach(), scale)
            self.is_first_microbatch = False
        own = self.weight.data
        self.weight.data = self._fp8_workspaces["weight"]
        try:
            return run(self, rounded)
        finally:
            self.weight.data = own
            recipe.end(self)

    kind.__init__, kind.forward = make_with_state, run_quantized


def install(recipe: Any, *, old: bool = False) -> None:
    """Have Megatron's local layers compute in fp8 inside of transformer blocks.

    Args:
        recipe: :class:`Delayed` or :class:`Tensorwise`.
        old: keep the global state as 2.15 and before do, in attributes of the class.
    """
    if old:
        for name in FP8GlobalState.__slots__:
            setattr(FP8GlobalStateManager, name, getattr(FP8GlobalState(), name))
        del FP8GlobalStateManager.quantization_state
    for name, held in {
        "quantization": (FP8GlobalStateManager, FP8GlobalState, DelayedScalingRecipeState),
        "distributed": (activation_recompute_forward,),
    }.items():
        module = ModuleType(f"transformer_engine.pytorch.{name}")
        for kind in held:
            kind.__module__ = module.__name__
            setattr(module, kind.__name__, kind)
        sys.modules[module.__name__] = module
    for layer in (ColumnParallelLinear, RowParallelLinear):
        _quantize(layer, recipe)
    recompute.te_checkpoint = checkpoint
    run = TransformerBlock.forward

    @functools.wraps(run)
    def run_in_autocast(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            return run(*args, **kwargs)

    TransformerBlock.forward = run_in_autocast
