"""What happened in a training, and the critical values of c of a network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from experiments import training
from experiments.phase_diagram.run import EVERY_THIRD, Cell
from megatron_sharpness.report.records import Array, Run
from megatron_sharpness.report.stages import Stage, stages_of

#: What may happen first at a growing c, in this order.
FALLS, LOSS_RISES, SHARPNESS_RISES, DIVERGES = range(4)


def rises(row: training.Row, field: str) -> bool:
    """Whether a field exceeds its first value within the ten steps, or training diverges."""
    return bool(row["diverged"] or max(row[field]) > row[field][0])


def phase(row: training.Row) -> int:
    """The last of :data:`FALLS` to :data:`DIVERGES` that is so."""
    if row["diverged"]:
        return DIVERGES
    if rises(row, "hessian_sharpness"):
        return SHARPNESS_RISES
    return LOSS_RISES if rises(row, "loss") else FALLS


def beside(row: training.Row) -> tuple[Array, Array]:
    """λ_max and λ_c at the steps of which both are known; λ_c is NaN where η_c was not found."""
    critical = np.array(row["critical_sharpness"], float)
    return np.array(row["hessian_sharpness"])[::EVERY_THIRD][: len(critical)], critical


@dataclass(frozen=True)
class Critical:
    """The critical values of c = ηλ_0^H of a network.

    Attributes:
        cell: the network.
        loss: the smallest c at which the loss rises (:func:`rises`).
        sharpness: the smallest c at which λ_max does.
        largest: the largest c below which no training diverges.
        of_first_step: 2λ_0^H/λ_c, from where on the first step alone raises the loss.
    """

    cell: Cell
    loss: float
    sharpness: float
    largest: float
    of_first_step: float


def networks(rows: Sequence[training.Row]) -> Iterator[tuple[Cell, list[training.Row]]]:
    """The rows of each network, by growing c."""
    for cell, group in itertools.groupby(
        rows, lambda row: Cell(row["activation"], row["depth"], row["width"], row["seed"])
    ):
        yield cell, list(group)


def critical_values(rows: Sequence[training.Row]) -> list[Critical]:
    """Of each network."""
    return [
        Critical(
            cell,
            next(row["c"] for row in own if rises(row, "loss")),
            next(row["c"] for row in own if rises(row, "hessian_sharpness")),
            own[-2]["c"],
            2.0 * own[0]["hessian_sharpness"][0] / first_sharpness(own),
        )
        for cell, own in networks(rows)
    ]


def first_sharpness(own: Sequence[training.Row]) -> float:
    """λ_c at initialization: the median of what was found from the rates of all trainings.

    Where the loss crosses its first value more than once along the update, a search that begins far
    below can find another crossing than the first.
    """
    return float(np.median([beside(row)[1][0] for row in own]))


def medians(found: Sequence[Critical], attribute: str) -> dict[float, float]:
    """Of an attribute over the seeds, by d/w, ascending."""
    values: dict[float, list[float]] = {}
    for each in found:
        values.setdefault(each.cell.depth / each.cell.width, []).append(getattr(each, attribute))
    return {ratio: float(np.median(values[ratio])) for ratio in sorted(values)}


def name(activation: str, depth: int) -> str:
    """Of a kind of network, for readers."""
    return f"{'ReLU' if activation == 'relu' else 'linear'}, {depth} layers"


def stages(rows: list[training.Row]) -> tuple[Stage, ...]:
    """As ``megatron-sharpness report`` names them."""
    return stages_of(Run("regimes", rows)).stages
