"""The step's own micro-batches once more, forward only, through Megatron's own schedule."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu, tensor_parallel
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.utils import StragglerDetector
from torch import Tensor

from megatron_sharpness.meter import ProbeError


class RecordingSchedule:
    """A ``forward_backward_func`` that runs the real one and remembers how to repeat it.

    It keeps the arguments, the micro-batches, and, from before the pass, the random states and the
    model's buffers. A pass that Megatron reruns is recorded anew.
    """

    def __init__(self, schedule: Callable[..., Any], model: Sequence[Any]) -> None:
        self.schedule = schedule
        self.model = model
        self.losses: Any = []
        self._kwargs: dict[str, Any] = {}
        self._batches: Any = None
        self._random: RandomStates | None = None
        self._buffers: list[Tensor] = []

    def __call__(self, **kwargs: Any) -> Any:
        self._kwargs = kwargs
        self._random = RandomStates()
        self._buffers = copies_of_buffers(self.model)
        self._batches = _map_iterators(kwargs["data_iterator"], _Tee)
        self.losses = self.schedule(**{**kwargs, "data_iterator": self._batches})
        return self.losses

    def replay(self) -> Any:
        """Per-micro-batch loss dictionaries of the last pipeline stage, at the model's weights."""
        assert self._random is not None, "nothing was recorded"
        self._random.restore()
        write_buffers(self.model, self._buffers)
        batches = _map_iterators(self._batches, lambda tee: iter([_shallow(b) for b in tee.seen]))
        with torch.no_grad():  # forward_only alone does not disable gradients
            return self.schedule(**{**self._kwargs, "data_iterator": batches, "forward_only": True})


class _Tee:
    """The iterator that it wraps, keeping what was drawn."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator
        self.seen: list[Any] = []

    def __iter__(self) -> _Tee:
        return self

    def __next__(self) -> Any:
        batch = next(self._iterator)
        self.seen.append(_shallow(batch))
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


def _shallow(batch: Any) -> Any:
    """A copy of the container: get_batch changes a batch's dictionary in place from 0.19 on."""
    return dict(batch) if isinstance(batch, dict) else batch


def _map_iterators(iterators: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of one iterator, or of each of the list that virtual pipeline stages have."""
    if isinstance(iterators, list):
        return [None if iterator is None else function(iterator) for iterator in iterators]
    return None if iterators is None else function(iterators)


class RandomStates:
    """All random states that a forward pass may draw from, as they are now."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state()
        self._tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
        # Transformer Engine's tracker holds generators, which move on in place.
        self._generators = {
            state: state.get_state()
            for state in self._tracker.values()
            if isinstance(state, torch.Generator)
        }

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        torch.cuda.set_rng_state(self._cuda)
        for generator, state in self._generators.items():
            generator.set_state(state)
        tensor_parallel.get_cuda_rng_tracker().set_states(dict(self._tracker))


def _buffers_of(model: Sequence[Any]) -> Iterator[Tensor]:
    for chunk in model:  # DDP shadows .buffers with a list of its own
        yield from chunk.module.buffers()


def copies_of_buffers(model: Sequence[Any]) -> list[Tensor]:
    return [buffer.detach().clone() for buffer in _buffers_of(model)]


def write_buffers(model: Sequence[Any], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(_buffers_of(model), values, strict=True):
            buffer.copy_(value)


def reduce_loss(losses: Any, error: Exception | None) -> tuple[float, int]:
    """Mean loss a token over all micro-batches and ranks, and the number of tokens.

    ``losses`` are a pass's loss dictionaries, of which Megatron's first entry is the language-model
    loss, [sum, tokens] or, as older scripts report it, the mean alone. They count on the last
    pipeline stage and one tensor-parallel rank; data- and context-parallel ranks add up. An error
    on any rank travels in the same reduction, so that all ranks give up together.

    Returns:
        The same numbers on every rank: rank 0's.

    Raises:
        ProbeError: ``error`` was given on some rank.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
    if error is not None:
        sums[2] = 1.0
    elif mpu.is_pipeline_last_stage(ignore_virtual=True) and (
        mpu.get_tensor_model_parallel_rank() == 0
    ):
        for micro_batch in losses:
            value = next(iter(micro_batch.values())).detach().double().view(-1)
            sums[0] += value[0]
            sums[1] += value[1] if value.numel() > 1 else 1.0
    dist.all_reduce(sums)
    dist.broadcast(sums, src=0)
    total, tokens, failures = sums.tolist()
    if failures:
        raise ProbeError(first_error(error))
    return (total / tokens if tokens else float("nan")), int(tokens)


def first_error(error: Exception | None) -> str:
    """The error of the lowest rank that has one, and which rank that is. Collective."""
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    rank, text = next((rank, text) for rank, text in enumerate(errors) if text is not None)
    return f"rank {rank}: {text}"


@contextlib.contextmanager
def quiet(
    model: Sequence[Any], config: Any, mode: str, switches: Iterable[tuple[Any, str, Any]]
) -> Iterator[None]:
    """Megatron as a probe needs it, and afterwards as if nothing had happened.

    No result validation (NaN at a large η is an answer here), no timers, no straggler detection,
    no gradient synchronization; random states, the model's buffers and its mode put back in the
    end.

    Args:
        model: the model chunks of this rank.
        config: their ``TransformerConfig``.
        mode: ``eval`` or ``train``.
        switches: owner, attribute and value of what the training loop itself has to be told.
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
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    states, buffers = RandomStates(), copies_of_buffers(model)
    for owner, name, value in replaced:
        setattr(owner, name, value)
    if mode == "eval":
        for chunk in model:
            chunk.eval()
    try:
        yield
    finally:
        if mode == "eval":
            for chunk in model:
                chunk.train()
        for owner, name, value in saved:
            setattr(owner, name, value)
        write_buffers(model, buffers)
        states.restore()
