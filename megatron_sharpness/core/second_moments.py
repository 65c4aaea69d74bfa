"""Signal-to-noise ratio of Adam's second moments: which of them could be replaced by their means.

Of the second moments V of a matrix, averaged over the dimension K and along the other one, K',

    SNR_K = E_K'[ (E_K[V])² / Var_K[V] ]

(Kalra, Kirchenbauer, Barkeshli and Goldstein, "When Can You Get Away with Low Memory Adam?", 2025,
arXiv 2503.01843). Where it is large, the means over K stand for V. ``fan_in`` averages each row
over its columns, ``fan_out`` each column over its rows, as rows are outputs and columns inputs of
``torch.nn.Linear``; ``both`` averages the matrix. An embedding's rows are tokens.

A matrix may lie in pieces on many ranks. Each adds up V and V² of its pieces, row by row and column
by column, and what is reduced over the ranks are these sums.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_sharpness.core.errors import ProbeError, reason_of
from megatron_sharpness.core.measurement import OVER
from megatron_sharpness.core.parts import LAYER
from megatron_sharpness.core.replay import all_max, first_error, of_all_ranks

#: What Adam calls them in its state.
MOMENTS = "exp_avg_sq"

#: Elements of second moments that are taken at a time, and of sums that are reduced at a time.
CHUNK, REDUCED = 2**20, 2**22

#: Relative variance of what differs by rounding alone.
ROUNDING = 1e-12

#: In a name, the number of an expert.
_EXPERT = re.compile(r"(?<=experts)\.\d+(?=\.)|(?<=\.weight)\d+$")


class Matrix(NamedTuple):
    """A matrix of the model, or a stack of them, as of experts.

    Attributes:
        name: in the whole model.
        shape: matrices, rows, columns.
        copy: tells matrices of one name apart, as experts have on different ranks.
    """

    name: str
    shape: tuple[int, int, int]
    copy: int = 0

    @property
    def sums(self) -> int:
        """How many numbers its :meth:`Piece.sums` are."""
        stack, rows, columns = self.shape
        return 2 * stack * (rows + columns) + 1


@dataclass(frozen=True)
class Piece:
    """What a rank has of a matrix's second moments: a run of a block's elements, row after row.

    Attributes:
        matrix: it is of.
        read: gives the run, in any shape.
        block: matrices, rows and columns of the block.
        offset: where the block begins in the matrix.
        start: where in the flattened block the run begins.
    """

    matrix: Matrix
    read: Callable[[], Tensor]
    block: tuple[int, int, int]
    offset: tuple[int, int, int] = (0, 0, 0)
    start: int = 0

    @torch.no_grad()
    def sums(self) -> Tensor:
        """Σ V and Σ V² of each row, Σ V and Σ V² of each column, and how many elements; fp64."""
        stack, rows, columns = self.matrix.shape
        moments = self.read().detach().reshape(-1)
        found = torch.zeros(self.matrix.sums, dtype=torch.float64, device=moments.device)
        by_row = found[: 2 * stack * rows].view(2, stack, rows)
        by_column = found[2 * stack * rows : -1].view(2, stack, columns)
        for number, row, column, values in self._runs(moments):
            along = slice(row, row + len(values))
            across = slice(column, column + values.shape[1])
            for power in (0, 1):
                by_row[power, number, along] += values.sum(dim=1)
                by_column[power, number, across] += values.sum(dim=0)
                values = values * values
        found[-1] = len(moments)
        return found

    def _runs(self, left: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
        """Pieces of rows, or several whole ones: where they are in the matrix, and their values."""
        _, height, width = self.block
        position = self.start
        while len(left):
            row, column = divmod(position, width)
            number, row = divmod(row, height)
            whole = 0 if column else min(len(left), CHUNK) // width
            whole = min(whole, height - row)
            taken = whole * width or min(len(left), width - column, CHUNK)
            values = left[:taken].double().view(max(1, whole), -1)
            yield self.offset[0] + number, self.offset[1] + row, self.offset[2] + column, values
            left, position = left[taken:], position + taken


class Source(NamedTuple):
    """An optimizer, or all of them.

    Attributes:
        pieces: those of this rank that count, each of the model's elements on one rank.
        sum_up: adds numbers up over all ranks, in place. Collective.
    """

    pieces: Callable[[], Iterable[Piece]]
    sum_up: Callable[[Tensor], Tensor]


class SecondMoments:
    """Measures the signal-to-noise ratios of a run's second moments.

    Args:
        warn: told, once, why they cannot be had.
    """

    def __init__(self, warn: Callable[[str], object]) -> None:
        self._warn = warn
        self._known: list[list[Matrix]] = []
        self._own: list[set[Matrix]] = []
        self._silent = False

    def measure(
        self, sources: Callable[[], Sequence[Source]], device: torch.device
    ) -> Mapping[str, Mapping[str, Any]] | None:
        """What :func:`by_kind` says of all matrices. Collective.

        Args:
            sources: gives them, on every rank as many.
            device: where the process group reduces.

        Returns:
            None where there is none, or where it failed: a warning says why.
        """
        try:
            found = self._measured(sources, device)
            if not found:
                raise ProbeError(f"no optimizer has second moments ({MOMENTS}) of a matrix")
            return by_kind(found)
        except Exception as error:  # whatever it is, the run goes on
            if not self._silent:
                self._silent = True
                self._warn(f"critical sharpness: adam_snr was not measured: {reason_of(error)}")
            return None

    def _measured(
        self, sources: Callable[[], Sequence[Source]], device: torch.device
    ) -> dict[Matrix, tuple[float, ...]]:
        given: Sequence[Source] = ()
        own: list[dict[Matrix, list[Piece]]] = []
        error: Exception | None = None
        try:
            given = sources()
            own = [_by_matrix(source.pieces()) for source in given]
        except Exception as caught:  # whatever it is, the others wait
            error = caught
        there = [set(have) for have in own]
        failed, changed = _anywhere([error is not None, there != self._own], device)
        if failed:
            raise ProbeError(first_error(error))
        if changed:  # matrices may get their moments later than others, and lose them
            everywhere = of_all_ranks(there)
            self._own = there
            self._known = [
                sorted({matrix for rank in everywhere for matrix in rank[number]})
                for number in range(len(given))
            ]
        found: dict[Matrix, tuple[float, ...]] = {}
        for source, have, names in zip(given, own, self._known, strict=True):
            for batch in _batches(names):
                sums = [torch.zeros(m.sums, dtype=torch.float64, device=device) for m in batch]
                try:
                    for matrix, total in zip(batch, sums, strict=True):
                        for piece in have.get(matrix, ()):
                            total += piece.sums().to(device)
                except Exception as caught:
                    error = error or caught
                summed = torch.split(source.sum_up(torch.cat(sums)), [m.sums for m in batch])
                ratios = torch.stack([_ratios(m, s) for m, s in zip(batch, summed, strict=True)])
                found |= {m: tuple(row) for m, row in zip(batch, ratios.tolist(), strict=True)}
        if any(_anywhere([error is not None], device)):
            raise ProbeError(first_error(error))
        return {matrix: _checked(matrix, *row) for matrix, row in found.items()}


def _by_matrix(pieces: Iterable[Piece]) -> dict[Matrix, list[Piece]]:
    found: dict[Matrix, list[Piece]] = defaultdict(list)
    for piece in pieces:
        found[piece.matrix].append(piece)
    return found


def _anywhere(flags: Sequence[bool], device: torch.device) -> list[float]:
    """Which of them are set on some rank. Collective."""
    found: list[float] = all_max(torch.tensor(flags, dtype=torch.float64), device).tolist()
    return found


def _checked(matrix: Matrix, count: float, *ratios: float) -> tuple[float, ...]:
    """The ratios, if all of the matrix is in them."""
    if count != math.prod(matrix.shape):
        raise ProbeError(
            f"of the {math.prod(matrix.shape)} second moments of {matrix.name} the ranks have "
            f"{count:g}"
        )
    return ratios


def _batches(names: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    batch: list[Matrix] = []
    for matrix in names:
        if batch and sum(m.sums for m in batch) + matrix.sums > REDUCED:
            yield batch
            batch = []
        batch.append(matrix)
    if batch:
        yield batch


def _ratios(matrix: Matrix, sums: Tensor) -> Tensor:
    """How many elements there were, and the ratio over each of :data:`OVER`; fp64, [4]."""
    stack, rows, columns = matrix.shape
    by_row = sums[: 2 * stack * rows].view(2, stack, rows)
    by_column = sums[2 * stack * rows : -1].view(2, stack, columns)
    ratios = torch.stack(
        (
            _ratio(by_row, columns),
            _ratio(by_column, rows),
            _ratio(by_row.sum(dim=-1), rows * columns),
        )
    )
    known = torch.where(sums.isfinite().all(), ratios, math.nan)
    return torch.cat((sums[-1:], known))


def _ratio(sums: Tensor, number: int) -> Tensor:
    """Mean of (E[V])² / Var[V]; NaN where there is no V that varies.

    Left out is what all is equal in: the row of a token that was never seen has no moments yet.

    Args:
        sums: Σ V and Σ V² of what V is averaged over; [2, …].
        number: of elements in each.
    """
    squared_mean = (sums[0] / number).square()
    variance = sums[1] / number - squared_mean
    varies = variance > ROUNDING * squared_mean
    return (squared_mean[varies] / variance[varies]).mean()


def kind_of(name: str) -> str:
    """The name of a matrix without the numbers of its layer and its expert."""
    layer = LAYER.search(name)
    if layer is not None:
        name = name[: layer.start(1) - 1] + name[layer.end(1) :]
    return _EXPERT.sub("", name)


def by_kind(found: Mapping[Matrix, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """By kind of layer (:func:`kind_of`): its ``shapes``, each as the number of matrices, rows and
    columns, and the mean of the ratios over each of :data:`OVER`; None where nothing varies."""
    groups: dict[str, dict[Matrix, Sequence[float]]] = defaultdict(dict)
    for matrix, ratios in found.items():
        groups[kind_of(matrix.name)][matrix] = ratios
    kinds = {}
    for name, of_kind in sorted(groups.items()):
        shapes: Counter[tuple[int, int]] = Counter()
        for stack, *shape in (matrix.shape for matrix in of_kind):
            shapes[shape[0], shape[1]] += stack
        over_each = zip(OVER, zip(*of_kind.values(), strict=True), strict=True)
        kinds[name] = {"shapes": [[count, *shape] for shape, count in sorted(shapes.items())]} | {
            over: _mean(values) for over, values in over_each
        }
    return kinds


def _mean(values: Iterable[float]) -> float | None:
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else None


def stacked(name: str, shape: Sequence[int]) -> tuple[int, int, int] | None:
    """Matrices, rows and columns of a parameter: a matrix is one, and what experts have in three
    dimensions a stack of them. None for all else, as vectors, convolutions, and what is empty."""
    dimensions = (2, 3) if "expert" in name else (2,)
    if len(shape) not in dimensions or 0 in shape:
        return None
    stack, rows, columns = (1, *shape)[-3:]
    return stack, rows, columns
