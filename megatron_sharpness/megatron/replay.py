"""The step's own micro-batches once more, forward only, through Megatron's own schedule."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.transformer.moe import router
from megatron.core.utils import StragglerDetector

from megatron_sharpness.evaluation import EvaluationSet
from megatron_sharpness.replay import Buffers, RandomStates, reduce_loss


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
        self._before: list[RandomStates | Buffers] = []

    def __call__(self, **kwargs: Any) -> Any:
        self._kwargs = kwargs
        self._before = [MegatronRandomStates(), _buffers_of(self.model)]
        self._batches = _map_iterators(kwargs["data_iterator"], _Tee)
        self.losses = self.schedule(**{**kwargs, "data_iterator": self._batches})
        return self.losses

    def micro_batches(self, samples: EvaluationSet) -> MicroBatches:
        """This rank's part of other data, laid out as the micro-batches of training are.

        Raises:
            RuntimeError: this script's micro-batches hold what is not known here.
        """
        rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        size = self._kwargs["micro_batch_size"]
        count = len(samples.tokens) // (ranks * size)
        first = rank * count * size
        starts = range(first, first + count * size, size)

        def batches(tee: _Tee) -> tuple[Any, ...]:
            seen = tee.seen[0]
            return tuple(_batch_like(seen, samples, slice(at, at + size)) for at in starts)

        return MicroBatches(_map_iterators(self._batches, batches), count)

    def evaluate(self, batches: MicroBatches) -> Any:
        """The same of other data, in evaluation mode."""
        for state in self._before:
            state.restore()
        modes = [chunk.training for chunk in self.model]
        for chunk in self.model:
            chunk.eval()
        try:
            iterators = _map_iterators(batches.held, lambda held: iter(map(_shallow, held)))
            return self._forward(iterators, batches.count)
        finally:
            for chunk, training in zip(self.model, modes, strict=True):
                chunk.train(training)

    def restore_buffers(self) -> None:
        """What the step has changed in the model's buffers (expert bias, say) taken back."""
        for state in self._before:
            if isinstance(state, Buffers):
                state.restore()

    def replay(self) -> Any:
        """Per-micro-batch loss dictionaries of the last pipeline stage, at the model's weights."""
        for state in self._before:
            state.restore()
        batches = _map_iterators(self._batches, lambda tee: iter([_shallow(b) for b in tee.seen]))
        return self._forward(batches, int(self._kwargs["num_microbatches"]))

    def _forward(self, batches: Any, microbatches: int) -> Any:
        changed = {
            "data_iterator": batches,
            "num_microbatches": microbatches,
            "forward_only": True,
        }
        with torch.no_grad():  # forward_only alone does not disable gradients
            return self.schedule(**{**self._kwargs, **changed})


@dataclass(frozen=True)
class MicroBatches:
    """What a rank puts into the model, in place of its data iterators.

    Attributes:
        held: micro-batches where the schedule has an iterator, a list of them by model chunk, or
            None on a rank that reads no data.
        count: how many micro-batches.
    """

    held: Any
    count: int


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


def _batch_like(seen: Any, samples: EvaluationSet, rows: slice) -> dict[str, torch.Tensor]:
    """A micro-batch of other data, laid out as one that Megatron's dataset has handed out.

    Raises:
        RuntimeError: this script's micro-batches hold what is not known here.
    """
    tokens = torch.from_numpy(samples.tokens[rows])
    length = tokens.shape[1] - 1
    made = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.from_numpy(samples.mask[rows]),
        "position_ids": torch.arange(length).expand(len(tokens), length),
    }
    if not isinstance(seen, dict) or set(seen) - {*made, "attention_mask"}:
        raise RuntimeError(
            f"--critical-sharpness-eval-data: the training script's micro-batches hold "
            f"{', '.join(seen) if isinstance(seen, dict) else type(seen).__name__}, and only "
            f"{', '.join(made)} and a causal attention_mask can be made of other data; leave the "
            "flag out"
        )
    batch = {
        key: value.to(seen[key].device, seen[key].dtype).contiguous()
        for key, value in made.items()
        if seen.get(key) is not None
    }
    return {**seen, **batch}  # the mask of a sequence of the same length is the same


def _map_iterators(iterators: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of one iterator, or of each of the list that virtual pipeline stages have."""
    if isinstance(iterators, list):
        return [None if iterator is None else function(iterator) for iterator in iterators]
    return None if iterators is None else function(iterators)


class MegatronRandomStates(RandomStates):
    """All random states that Megatron's forward pass may draw from, as they are now."""

    def __init__(self) -> None:
        super().__init__()
        self._tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
        # Transformer Engine's tracker holds generators, which move on in place.
        self._generators = {
            state: state.get_state()
            for state in self._tracker.values()
            if isinstance(state, torch.Generator)
        }

    def restore(self) -> None:
        super().restore()
        for generator, state in self._generators.items():
            generator.set_state(state)
        tensor_parallel.get_cuda_rng_tracker().set_states(dict(self._tracker))


def _buffers_of(model: Sequence[Any]) -> Buffers:
    return Buffers(chunk.module for chunk in model)  # DDP shadows .buffers with a list of its own


def reduce_losses(losses: Any, error: Exception | None) -> tuple[float, int]:
    """Mean loss a token over all micro-batches and ranks, and the number of tokens. Collective.

    ``losses`` are a pass's loss dictionaries, of which Megatron's first entry is the language-model
    loss, [sum, tokens] or, as older scripts report it, the mean alone. They count on the last
    pipeline stage and one tensor-parallel rank; data- and context-parallel ranks add up. Returns
    and raises as :func:`~megatron_sharpness.replay.reduce_loss` does.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=current_device())
    if error is None and (
        mpu.is_pipeline_last_stage(ignore_virtual=True)
        and mpu.get_tensor_model_parallel_rank() == 0
    ):
        for micro_batch in losses:
            value = next(iter(micro_batch.values())).detach().double().view(-1)
            sums[0] += value[0]
            sums[1] += value[1] if value.numel() > 1 else 1.0
    return reduce_loss(sums[0], sums[1], error, current_device())


def current_device() -> torch.device:
    """Where Megatron's process groups reduce."""
    return torch.device("cuda", torch.cuda.current_device())


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
    model: Sequence[Any], config: Any, mode: str, switches: Iterable[tuple[Any, str, Any]]
) -> Iterator[None]:
    """Megatron as a probe needs it, and afterwards as if nothing had happened.

    No result validation (NaN at a large η is an answer here), no timers, no straggler detection,
    no gradient synchronization, no router that iterates for ever; random states, the model's
    buffers and its mode put back in the end.

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
        (router, "sinkhorn", _with_patience(router.sinkhorn)),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    states, buffers = MegatronRandomStates(), _buffers_of(model)
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
        buffers.restore()
        states.restore()
