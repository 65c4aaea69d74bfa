"""Megatron as a probe needs it: no checks, timers or graphs, and nothing that a pass leaves."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.transformer import transformer_block
from megatron.core.transformer.moe import router
from megatron.core.utils import StragglerDetector

from megatron_sharpness.core.state import State
from megatron_sharpness.megatron import graphs
from megatron_sharpness.megatron.states import MegatronRandomStates, state_of, state_of_losses

#: Iterations of a router's Sinkhorn algorithm in a probe: in training it takes tens.
SINKHORN_ITERATIONS = 1000


class _Patience:
    """A tolerance that after enough comparisons is met: at weights far out, the loop
    ``while error > tolerance`` in Megatron's ``sinkhorn`` (moe_utils.py) may never end."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._comparisons = 0

    def __lt__(self, error: Any) -> bool:
        self._comparisons += 1
        return self._comparisons <= SINKHORN_ITERATIONS and bool(error > self._tolerance)


def _with_patience(sinkhorn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(sinkhorn)
    def sinkhorn_that_ends(cost: Any, tol: float = 0.0001) -> Any:
        return sinkhorn(cost, _Patience(tol))

    return sinkhorn_that_ends


@contextlib.contextmanager
def quiet(
    model: Sequence[Any],
    config: Any,
    mode: str,
    switches: Iterable[tuple[Any, str, Any]],
    fail: Callable[[Exception], object],
) -> Iterator[None]:
    """Megatron as a probe needs it, and afterwards as if nothing had happened.

    No result validation (NaN at a large η is an answer here), no timers, no straggler detection,
    no gradient synchronization, no router that iterates for ever, no graphs; random states, what
    the model keeps and its mode put back in the end.

    Args:
        model: the model chunks of this rank.
        config: their ``TransformerConfig``.
        mode: ``eval`` or ``train``.
        switches: owner, attribute and value of what the training loop itself has to be told.
        fail: told what went wrong while all that was kept, out of memory, say. Then no pass may be
            made on any rank.
    """
    detector = StragglerDetector._instance  # calling the class would configure it anew
    replaced = [
        *switches,
        # Validation asserts that it is called inside a training pass; off, it still raises on NaN.
        (get_rerun_state_machine(), "mode", RerunMode.DISABLED),
        (config, "no_sync_func", None),  # forward-only schedules enter it and never leave
        (config, "param_sync_func", None),
        (config, "grad_sync_func", None),
        (config, "timers", None),
        (detector, "start", detector.null_method),
        (detector, "stop", detector.null_method),
        (router, "sinkhorn", _with_patience(router.sinkhorn)),
        *_states_of_overlap(config),
        *graphs.switches(model),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    kept: list[State | MegatronRandomStates] = []
    try:
        kept = [state_of(model), state_of_losses(), MegatronRandomStates()]
    except Exception as caught:
        fail(caught)
    for owner, name, value in replaced:
        setattr(owner, name, value)
    if mode == "eval":
        for chunk in model:
            chunk.eval()
    try:
        with _activations_stay():
            yield
    finally:
        if mode == "eval":
            for chunk in model:
                chunk.train()
        for owner, name, value in saved:
            setattr(owner, name, value)
        for state in kept:
            state.restore()


def _states_of_overlap(config: Any) -> list[tuple[Any, str, Any]]:
    """What has a forward pass draw from the random states that the training pass has drawn from.

    The schedule of ``--overlap-moe-expert-parallel-comm`` calls the layers of a block by
    themselves, and so without the states that a block has them draw from under sequence
    parallelism, as it does in a pass that is forward only.
    """
    if not getattr(config, "overlap_moe_expert_parallel_comm", False):
        return []
    return [(transformer_block, "tensor_parallel", _WithoutOwnStates())]


class _WithoutOwnStates:
    """``megatron.core.tensor_parallel``, but whose tracker of random states forks none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tensor_parallel, name)

    def get_cuda_rng_tracker(self) -> Any:
        return SimpleNamespace(fork=contextlib.nullcontext)


_OFFLOADING = "megatron.core.pipeline_parallel.fine_grained_activation_offload"


@contextlib.contextmanager
def _activations_stay() -> Iterator[None]:
    """Within it no activation is offloaded: the offloading counts on a backward pass."""
    manager = getattr(sys.modules.get(_OFFLOADING), "PipelineOffloadManager", None)
    offloading = getattr(manager, "OFFLOAD_MGR", None)
    if offloading is None or not offloading.do_offload:
        yield
        return
    offloading.disable_offload()
    try:
        yield
    finally:
        offloading.enable_offload()
