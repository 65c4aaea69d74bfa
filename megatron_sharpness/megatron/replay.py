"""The step's own micro-batches once more, forward only, through Megatron's own schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_model_config

from megatron_sharpness.core.recorder import Recorder
from megatron_sharpness.core.replay import reduce_loss
from megatron_sharpness.core.state import State
from megatron_sharpness.data.evaluation import EvaluationSet
from megatron_sharpness.megatron import engine, graphs
from megatron_sharpness.megatron.states import MegatronRandomStates, state_of


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

    Args:
        schedule: the real one.
        model: the model chunks of this rank.
        beside: names in micro-batches of what a pass over other data does not need.

    Attributes:
        losses: of the training pass, on ranks that compute any.
        error: what went wrong while recording it.
        first: whether state was made in it without which it cannot be repeated.
    """

    def __init__(
        self,
        schedule: Callable[..., Any],
        model: Sequence[Any],
        *,
        beside: Set[str] = frozenset(),
    ) -> None:
        self.schedule = schedule
        self.model = model
        self._beside = beside
        self.losses: list[Loss] = []
        self.error: Exception | None = None
        self.first = False
        self._scales = engine.Scales()
        self._graph = graphs.note_losses(schedule, noting)
        self._kwargs: dict[str, Any] = {}
        self._batches: Any = None
        self._random: MegatronRandomStates | None = None
        self._state: State | None = None

    def __call__(self, **kwargs: Any) -> Any:
        self._kwargs = kwargs
        try:
            self._random = MegatronRandomStates()
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
        first, length = rank * count * size, samples.tokens.shape[1] - 1
        starts = range(first, first + count * size, size)

        def batches(tee: _Tee) -> tuple[Any, ...]:
            seen = tee.seen[0]
            if isinstance(seen, dict):
                seen = {key: value for key, value in seen.items() if key not in self._beside}
                seen = _causal(seen, length)
            return tuple(_batch_like(seen, samples, slice(at, at + size)) for at in starts)

        return MicroBatches(_map_iterators(self._batches, batches), count, length)

    def evaluate(self, batches: MicroBatches) -> list[Loss]:
        """The same of other data, in evaluation mode."""
        self._restore()
        modes = [chunk.training for chunk in self.model]
        for chunk in self.model:
            chunk.eval()
        try:
            iterators = _map_iterators(batches.held, lambda held: iter(map(_shallow, held)))
            return self._forward(iterators, batches.count, batches.length)
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

    def take_times(self, recorder: Recorder) -> None:
        """Have a trial know how long each :meth:`replay` takes, and how many tokens each of its
        losses is of: 1 where the loss function says none."""

        def tokens(losses: list[Loss]) -> list[float]:
            return [1.0 if each.tokens is None else float(each.tokens.sum()) for each in losses]

        self.replay = recorder.timed(self.replay, tokens)  # type: ignore[method-assign]

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

    def _forward(self, batches: Any, microbatches: int, length: int | None = None) -> list[Loss]:
        losses: list[Loss] = []
        lengths = () if length is None else ("seq_length", "decoder_seq_length")
        changed = {
            **{name: length for name in lengths if self._kwargs.get(name) is not None},
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
        length: of their sequences, which finetuning has of its own for each batch.
    """

    held: Any
    count: int
    length: int


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
            "other data: the training script's micro-batches hold "
            f"{', '.join(seen) if isinstance(seen, dict) else type(seen).__name__}, and only "
            f"{', '.join(made)} and a causal attention_mask can be made of it; measure without"
        )
    batch = {
        key: value.to(seen[key].device, seen[key].dtype).contiguous()
        for key, value in made.items()
        if seen.get(key) is not None
    }
    return {**seen, **batch}


def _causal(seen: dict[str, Any], length: int) -> dict[str, Any]:
    """A micro-batch whose mask, where it has one, is of sequences of ``length`` tokens that are one
    document each.

    Raises:
        RuntimeError: it is no mask of queries and keys that is known here.
    """
    mask = seen.get("attention_mask")
    if mask is None:
        return seen
    if mask.dim() != 4 or mask.dtype != torch.bool:
        raise RuntimeError(
            f"other data: the attention_mask is {mask.dtype} of shape {tuple(mask.shape)}, and the "
            "one that can be made is, in [samples, 1, queries, keys], True where a key is hidden"
        )
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)  # True is what is not attended to
    whole = hidden.to(mask.device, mask.dtype).expand(*mask.shape[:-2], length, length)
    return {**seen, "attention_mask": whole.contiguous()}


def _map_iterators(iterators: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of one iterator, or of each of the list that virtual pipeline stages have."""
    if isinstance(iterators, list):
        return [None if iterator is None else function(iterator) for iterator in iterators]
    return None if iterators is None else function(iterators)


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
