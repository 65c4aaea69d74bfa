"""Where the second moments of a loop's Adam lie on the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from megatron_sharpness.core.errors import SettingError
from megatron_sharpness.core.replay import all_sum
from megatron_sharpness.core.second_moments import MOMENTS, Matrix, Piece, Source, stacked
from megatron_sharpness.pytorch.parts import name_of, names_of
from megatron_sharpness.pytorch.passes import collective_device
from megatron_sharpness.pytorch.shards import Tensors, deepspeed, local


def check_has_moments(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers of which none can have second moments that we see.

    Raises:
        SettingError: names the reason and the remedy.
    """
    if any(map(deepspeed.owns, optimizers)):
        raise SettingError(
            "adam_snr", True, "what DeepSpeed steps holds pieces of many parameters, whose rows "
            "and columns are not told apart; leave it out",
        )  # fmt: skip
    if not any("betas" in group for each in optimizers for group in each.param_groups):
        kinds = ", ".join(sorted({type(each).__name__ for each in optimizers}))
        raise SettingError(
            "adam_snr", True, f"{kinds} keeps no {MOMENTS}; train with Adam, or leave it out"
        )


def sources_of(model: nn.Module, shards: Sequence[Tensors]) -> list[Source]:
    """Those of all optimizers together.

    Args:
        model: as the loop calls it.
        shards: what each optimizer steps on this rank.
    """
    sum_up = partial(all_sum, device=collective_device())
    return [Source(lambda: _pieces(model, shards), sum_up)]


def _pieces(model: nn.Module, shards: Sequence[Tensors]) -> Iterator[Piece]:
    names = names_of(model)
    seen: Counter[str] = Counter()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for held in shards:
        for parameter in held.parameters():
            name = name_of(parameter, names) or "unnamed"
            # Stages of a pipeline may have the same names, on other ranks or on one.
            copy = held.first_rank + ranks * seen[name]
            seen[name] += 1
            moments = held.state_of(parameter).get(MOMENTS)
            place = held.place_of(parameter)
            shape, block = stacked(name, place.shape), stacked(name, place.block)
            if moments is None or shape is None or block is None or not held.is_counted(parameter):
                continue
            if moments.shape != parameter.shape or _is_rotated(held):  # means already, or no rows
                continue
            number, row, column = (0, 0, 0, *place.offset)[-3:]
            matrix, offset = Matrix(name, shape, copy), (number, row, column)
            yield Piece(matrix, partial(_values, moments), block, offset, place.start)


def _is_rotated(shards: Tensors) -> bool:
    """Whether the optimizer keeps them in another basis, whose rows are no outputs."""
    return "SOAP" in type(shards.optimizer).__name__.upper()


def _values(moments: Tensor) -> Tensor:
    held = local(moments)
    if type(held) in (Tensor, Parameter):
        return held
    read: Tensor = held.dequantize()  # a class of torchao's, in 8 bits or 4
    return read
