"""What the trainings show where their depth grows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from experiments.recurrence.run import HELD_EVERY, WINDOW, Trained

#: By the name of the case.
Runs = dict[str, Trained]


def pairs(
    runs: Runs, loop: str, curriculum: str, rate: str = "same"
) -> Iterator[tuple[Trained, Trained]]:
    """For each seed a training, and that of the plain GPT on the same batches."""
    for run in runs.values():
        case = run.case
        if (case.loop, case.curriculum, case.rate) == (loop, curriculum, rate):
            yield run, runs[f"injected-1-same-{case.seed}"]


def before(values: NDArray[np.float64], jump: int) -> NDArray[np.float64]:
    """Those of the steps before it."""
    return values[jump - 1 - WINDOW : jump - 1]


def after(values: NDArray[np.float64], jump: int) -> NDArray[np.float64]:
    """Those of the jump's own step and the next ones."""
    return values[jump - 1 : jump - 1 + WINDOW]


def rise(run: Trained, plain: Trained, jump: int) -> float:
    """Median λ_c after / before, over that of the plain GPT, which saw the same batches."""
    own, other = (
        np.median(after(each.sharpness, jump)) / np.median(before(each.sharpness, jump))
        for each in (run, plain)
    )
    return float(own / other)


def excess(run: Trained, plain: Trained, jump: int) -> float:
    """By how much more than the plain GPT's the mean loss rises, in nats."""
    own, other = (
        after(each.loss, jump).mean() - before(each.loss, jump).mean() for each in (run, plain)
    )
    return float(own - other)


def foretold(run: Trained, jump: int) -> float:
    """λ_c at the next depth / λ_c along the same updates, before a jump."""
    return float(np.median(before(run.deeper, jump)) / np.median(before(run.sharpness, jump)))


def edges(run: Trained, jump: int) -> NDArray[np.float64]:
    """η/η_c of the steps from a jump on."""
    return after(run.lr * run.sharpness / 2, jump)


def late(run: Trained) -> float:
    """Median λ_c in the last 40 steps."""
    return float(np.nanmedian(run.sharpness[-40:]))


def cost(run: Trained) -> NDArray[np.float64]:
    """Blocks that its steps went through so far, forward."""
    return np.cumsum([run.case.blocks(step) for step in range(1, run.case.steps + 1)])


def held_at(run: Trained, blocks: float) -> float:
    """Its held-out loss, at the depth it then had, once it has cost so many blocks."""
    spent = cost(run)[HELD_EVERY - 1 :: HELD_EVERY]
    return float(np.interp(blocks, spent, run.held))


def against_plain(run: Trained, plain: Trained) -> float:
    """Held-out loss in the end, at its depth − the plain GPT's for as many blocks."""
    return float(run.held[-1] - held_at(plain, cost(run)[-1]))


def typical(values: list[float]) -> float:
    """Their geometric mean."""
    return math.exp(np.mean(np.log(values)))
