"""The tables of the README, from the records."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from experiments import training
from experiments.warmup import criterion
from experiments.warmup.claims import NAMES, PAIRS, TITLES, first_critical, natural
from experiments.warmup.run import MODELS


def savings(runs: training.Runs) -> Iterator[str]:
    """What the criterion counts, and the same of trainings that are as long as the plain ones."""
    cells = criterion.cells(runs)
    yield (
        "| | cells | less than a step to save | save | lost | as long: save | as long: lost "
        "| plain, ended as early: as good | median share of the warm-up saved |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    groups = {
        case: [cell for cell in cells if (cell.model, cell.optimizer) == pair]
        for case, pair in PAIRS.items()
    }
    for name, group in (*groups.items(), ("all", cells)):
        cut, same = (criterion.outcome(group, which) for which in ("cut", "same"))
        those = criterion.judged(group)
        shorter = sum(cell.saves("shorter") for cell in those)
        share = np.median([np.mean([row["saved"] for row in c.rows]) / c.warmup for c in those])
        yield (
            f"| {name} | {cut.cells} | {cut.nothing} | {cut.save} | {cut.lost} "
            f"| {same.save} | {same.lost} | {shorter} | {share:.2f} |"
        )


def starts(runs: training.Runs) -> Iterator[str]:
    """Where the trainings begin."""
    yield (
        "| | η_c of the first update, 8 batches | λ_max, λ_max^PH under Adam, at step 24 "
        "| step 96 / step 24 |"
    )
    yield "|---|---|---|---|"
    for model in MODELS:
        for optimizer, name in NAMES.items():
            first = first_critical(runs, model, optimizer)
            seen = natural(runs, model, optimizer)
            yield (
                f"| {TITLES[model]}, {name} | {min(first):.2g} to {max(first):.2g} | {seen[0]:.3g} "
                f"| {seen[-1] / seen[0]:.2f} |"
            )
