"""Where the second moments of Megatron's Adam lie on the ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from megatron_sharpness.core.errors import SettingError
from megatron_sharpness.core.second_moments import MOMENTS, Matrix, Piece, Source, stacked
from megatron_sharpness.megatron.parts import name_of, names_of
from megatron_sharpness.megatron.shards import Leaf


def check_has_moments(options: Any) -> None:
    """Refuse an optimizer that has no second moments.

    Args:
        options: what has ``optimizer``: an ``OptimizerConfig``, or Megatron's arguments.

    Raises:
        SettingError: names the reason and the remedy.
    """
    if options.optimizer in ("sgd", "lion", "soap"):
        raise SettingError(
            "adam_snr", True, f"the optimizer {options.optimizer} keeps no second moments of rows "
            "and columns; train with adam, or leave it out"
        )  # fmt: skip


def sources_of(leaves: Sequence[Leaf], model: Sequence[Any]) -> list[Source]:
    """Those of each optimizer.

    Args:
        leaves: the optimizers that own parameters.
        model: the model chunks of this rank.
    """
    names = names_of(model)
    return [Source(functools.partial(_pieces, leaf, names), leaf.sum_up) for leaf in leaves]


def _pieces(leaf: Leaf, names: Mapping[int, str]) -> Iterator[Piece]:
    for each in leaf.stepped():
        weight = each.parameter if each.weight is None else each.weight
        name = name_of(each, names)
        inner, block = leaf.optimizer.optimizer, stacked(name, weight.shape)
        there = MOMENTS in inner.state.get(each.parameter, {})
        if not there or block is None or not leaf.counts(each.parameter):
            continue
        shape, offset = list(block), [0, 0, 0]
        if getattr(weight, "tensor_model_parallel", False):
            rank, ranks = _tensor_parallel(weight)
            split = int(weight.partition_dim) + 3 - weight.dim()  # type: ignore[attr-defined]
            shape[split] *= ranks
            offset[split] = rank * block[split]
        matrix = Matrix(name, (shape[0], shape[1], shape[2]), _expert_rank(weight))
        read = functools.partial(_moments, inner, each.parameter)
        yield Piece(matrix, read, block, (offset[0], offset[1], offset[2]), each.start)


def _moments(inner: Any, parameter: Tensor) -> Tensor:
    """What this rank has of a parameter's second moments."""
    if hasattr(inner, "get_unscaled_state"):  # they may be kept in 16 bits, or in 8
        moments: Tensor = inner.get_unscaled_state(parameter, MOMENTS)
    else:
        moments = inner.state[parameter][MOMENTS]
    return getattr(moments, "_local_tensor", moments)


def _is_of_expert(weight: Tensor) -> bool:
    return not getattr(weight, "allreduce", True)


def _expert_rank(weight: Tensor) -> int:
    """Experts of different ranks have the same names."""
    if not _is_of_expert(weight):
        return 0
    return int(parallel_state.get_expert_model_parallel_rank())


def _tensor_parallel(weight: Tensor) -> tuple[int, int]:
    """This rank among those that a weight is split over, and how many these are."""
    if _is_of_expert(weight):
        return (
            int(parallel_state.get_expert_tensor_parallel_rank()),
            int(parallel_state.get_expert_tensor_parallel_world_size()),
        )
    return (
        int(parallel_state.get_tensor_model_parallel_rank()),
        int(parallel_state.get_tensor_model_parallel_world_size()),
    )
