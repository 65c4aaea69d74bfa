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
from megatron.core.utils import StragglerDetector, get_model_config
from torch.distributed.tensor import DTensor

from megatron_sharpness.core.replay import RandomStates, reduce_loss
from megatron_sharpness.core.state import State
from megatron_sharpness.data.evaluation import EvaluationSet
from megatron_sharpness.megatron import engine, graphs
from megatron_sharpness.megatron.shards import megatron_fsdp
from megatron_sharpness.megatron.side_effects import activations_stay, logged_losses


@dataclass(frozen=True)
class Loss:
    """What a training script's loss function has returned for one micro-batch.

    Attributes:
        loss: the scalar that is differentiated once it is divided by ``tokens``.
        tokens: its tokens, or None where the scalar is a mean already.
    """

    loss: torch.Tensor
    tokens: torch.Tensor | None


class RecordingSchedule:
    """A ``forward_backward_func`` that runs the real one and remembers how to repeat it.

    It keeps the arguments, the micro-batches, the losses, and, from before the pass, the random
    states and what the model keeps beside its parameters. A pass that Megatron reruns is recorded
    anew.

    Attributes:
        losses: of the training pass, on ranks that compute any.
        error: what went wrong while recording it.
        first: whether state was made in it without which it cannot be repeated.
    """

    def __init__(self, schedule: Callable[..., Any], model: Sequence[Any]) -> None:
        self.schedule = schedule
        self.model = model
        self.losses: list[Loss] = []
        self.error: Exception | None = None
        self.first = False
        self._scales = engine.Scales()
        self._graph = graphs.note_losses(schedule, noting)
        self._kwargs: dict[str, Any] = {}
        self._batches: Any = None
        self._random: RandomStates | None = None
        self._state: State | None = None

    def __call__(self, **kwargs: Any) -> Any:
        self._kwargs = kwargs
        self._random = MegatronRandomStates()
        try:
            self._state = state_of(self.model)
        except Exception as caught:  # out of memory, say: the training pass goes on
            self.error = caught
        self._batches = _map_iterators(kwargs["data_iterator"], _Tee)
        unready = engine.not_ready(self.model)
        with self._scales.noted():
            result = self._train({**kwargs, "data_iterator": self._batches})
        self.first = engine.made_ready(unready)
        return result

    def _train(self, kwargs: dict[str, Any]) -> Any:
        if self._graph is not None:
            result = self.schedule(**kwargs)
            self.losses = self._graph.losses
            return result
        self.losses = []
        step = noting(kwargs["forward_step_func"], self.losses)
        return self.schedule(**{**kwargs, "forward_step_func": step})

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

    def evaluate(self, batches: MicroBatches) -> list[Loss]:
        """The same of other data, in evaluation mode."""
        self._restore()
        modes = [chunk.training for chunk in self.model]
        for chunk in self.model:
            chunk.eval()
        try:
            iterators = _map_iterators(batches.held, lambda held: iter(map(_shallow, held)))
            return self._forward(iterators, batches.count)
        finally:
            for chunk, training in zip(self.model, modes, strict=True):
                chunk.train(training)

    def restore_state(self) -> None:
        """What the step has changed in the model's buffers (expert bias, say) taken back."""
        if self._state is not None:
            self._state.restore()

    def _restore(self) -> None:
        self.restore_state()
        if self._random is not None:
            self._random.restore()

    def replay(self) -> list[Loss]:
        """The losses of the micro-batches on the last pipeline stage, at the model's weights."""
        self._restore()
        batches = _map_iterators(self._batches, lambda tee: iter([_shallow(b) for b in tee.seen]))
        with self._scales.repeated():
            return self._forward(batches, int(self._kwargs["num_microbatches"]))

    def reduce(
        self, losses: list[Loss] | None, error: Exception | None, *, per_token: bool
    ) -> tuple[float, int]:
        """Mean loss over all micro-batches and ranks, and the number of tokens. Collective.

        Args:
            losses: of this rank's micro-batches. They count on the last pipeline stage and one
                tensor-parallel rank; data- and context-parallel ranks add up.
            error: why there are none, if so.
            per_token: whether all tokens count alike, or, as in Megatron's gradients without
                ``--calculate-per-token-loss``, all micro-batches.
        """
        counts = mpu.is_pipeline_last_stage(ignore_virtual=True) and (
            mpu.get_tensor_model_parallel_rank() == 0
        )
        samples = float(self._kwargs["micro_batch_size"])
        return reduce_losses(
            losses if counts and losses else [], error, samples=samples, per_token=per_token
        )

    @property
    def terms(self) -> int:
        """How many losses of micro-batches :meth:`reduce` adds up over all ranks."""
        ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
        return int(self._kwargs["num_microbatches"]) * int(ranks)

    @property
    def per_token(self) -> bool:
        """Whether all tokens count alike in what is differentiated."""
        return bool(get_model_config(self.model[0]).calculate_per_token_loss)

    def _forward(self, batches: Any, microbatches: int) -> list[Loss]:
        losses: list[Loss] = []
        changed = {
            "forward_step_func": noting(self._kwargs["forward_step_func"], losses),
            "data_iterator": batches,
            "num_microbatches": microbatches,
            "forward_only": True,
        }
        with torch.no_grad():  # forward_only alone does not disable gradients
            graphs.by_kernels(self.schedule)(**{**self._kwargs, **changed})
        return losses


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


def noting(forward_step: Callable[..., Any], losses: list[Loss]) -> Callable[..., Any]:
    """A ``forward_step_func`` that notes what its loss functions return.

    That is (loss, tokens, what is logged), where the schedule divides the one by the other, or
    (loss, what is logged). What is logged first need not be the loss: knowledge distillation trains
    on another entry, and BERT on a sum of two.
    """

    @functools.wraps(forward_step)
    def noting_step(*args: Any, **kwargs: Any) -> Any:
        output, loss_function = forward_step(*args, **kwargs)
        if loss_function is None:
            return output, None

        def noting_loss(*outputs: Any, **options: Any) -> Any:
            returned = loss_function(*outputs, **options)
            if not options.get("non_loss_data"):
                # The schedule divides in place.
                loss, *tokens = (value.detach().clone() for value in returned[:-1])
                losses.append(Loss(loss, tokens[0] if tokens else None))
            return returned

        return output, noting_loss

    return noting_step


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


def state_of(model: Sequence[Any]) -> State:
    """What the modules of this rank's model chunks keep beside their parameters."""
    roots = {f"model {i}": megatron_fsdp.unwrapped(chunk) for i, chunk in enumerate(model)}
    opened = (engine.LIBRARY,) if engine.quantizes(model) else ()
    weights = {_storage(weight) for chunk in model for weight in chunk.parameters()}
    return State(
        {**roots, **engine.shared_state(model)},
        copied=lambda tensor: _storage(tensor) not in weights,  # a probe moves weights
        opened=opened,
        without=graphs.holders(model),
    )


def _storage(tensor: torch.Tensor) -> int:
    """Where a tensor lies; what has no memory lies nowhere that another one does."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    try:
        return held.untyped_storage().data_ptr() or -id(held)
    except RuntimeError:  # of a tensor that is made of others
        return -id(held)


def reduce_losses(
    losses: Sequence[Loss], error: Exception | None, *, samples: float, per_token: bool
) -> tuple[float, int]:
    """Mean loss over the micro-batches of all ranks, and the number of tokens. Collective.

    Returns and raises as :func:`~megatron_sharpness.core.replay.reduce_loss` does.

    Args:
        losses: of the micro-batches that count on this rank.
        error: why there are none, if so.
        samples: in a micro-batch, counted where a loss function says no number of tokens.
        per_token: whether all tokens count alike, or all micro-batches.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=current_device())
    for entry in losses:
        loss = entry.loss.double().sum()
        one = torch.ones_like(loss)
        if entry.tokens is None:  # the schedule multiplies it by the context-parallel ranks
            sums += torch.stack(
                (loss * mpu.get_context_parallel_world_size(), one, one * samples)
            )
            continue
        tokens = entry.tokens.double().sum()
        if per_token:
            sums += torch.stack((loss, tokens, tokens))
        else:  # as the schedule does, also where all tokens are masked
            sums += torch.stack((loss / tokens.clamp(min=1.0), one, tokens))
    return reduce_loss(sums[0], sums[1], error, current_device(), tokens=sums[2])


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
    no gradient synchronization, no router that iterates for ever, no graphs; random states, what
    the model keeps and its mode put back in the end.

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
        *graphs.switches(model),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    random, state, logged = MegatronRandomStates(), state_of(model), State(logged_losses())
    for owner, name, value in replaced:
        setattr(owner, name, value)
    if mode == "eval":
        for chunk in model:
            chunk.eval()
    try:
        with activations_stay():
            yield
    finally:
        if mode == "eval":
            for chunk in model:
                chunk.train()
        for owner, name, value in saved:
            setattr(owner, name, value)
        state.restore()
        logged.restore()
        random.restore()
