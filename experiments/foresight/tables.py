"""The tables of the README, from the records."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from experiments.foresight.analysis import (
    AHEAD,
    RIVALS,
    SIGNALS,
    Runs,
    alarms,
    foretold,
    spikes,
    within_runs,
)

#: What is fitted together.
COMBINED = {
    "loss and gradient norm": RIVALS,
    "η/η_c": ("η/η_c", "its median of 5", "its rise"),
    "loss, gradient norm and η/η_c": (*RIVALS, "η/η_c", "its median of 5", "its rise"),
    "and parts": SIGNALS,
}


def apart(runs: Runs) -> tuple[Runs, Runs]:
    """The runs of seed 0, which thresholds are chosen on, and the others."""
    chosen = {name: run for name, run in runs.items() if run.case.seed == 0}
    return chosen, {name: run for name, run in runs.items() if name not in chosen}


def counted(runs: Runs) -> tuple[int, int, int]:
    """Trainings, those with a spike, and spikes."""
    found = [len(spikes(run)) for run in runs.values()]
    return len(found), sum(map(bool, found)), sum(found)


def within_table(runs: Runs) -> Iterator[str]:
    """Of all runs: nothing is chosen."""
    yield f"| signal | {' | '.join(f'{ahead} steps ahead' for ahead in AHEAD)} |"
    yield "|---" * (1 + len(AHEAD)) + "|"
    found = {ahead: within_runs(runs, ahead) for ahead in AHEAD}
    for name in SIGNALS:
        cells = []
        for ahead in AHEAD:
            areas = found[ahead][name]
            error = np.std(areas, ddof=1) / len(areas) ** 0.5
            cells.append(f"{np.mean(areas):.2f} ± {error:.2f}")
        yield f"| {name} | {' | '.join(cells)} |"


def combined_table(runs: Runs) -> Iterator[str]:
    chosen, tried = apart(runs)
    yield (
        "| steps ahead | from | AUC (90 % of trainings drawn anew) | AUC within a training "
        "| precision (of chance) | recall |"
    )
    yield "|---|---|---|---|---|---|"
    for ahead in AHEAD:
        for name, signals in COMBINED.items():
            found = foretold(chosen, tried, ahead, signals)
            yield (
                f"| {ahead} | {name} | {found.area:.2f} ({found.lowest:.2f}–{found.highest:.2f}) "
                f"| {found.within:.2f} | "
                f"{found.precision:.2f} ({found.rate:.3f}) | {found.recall:.2f} |"
            )


def alarm_table(runs: Runs) -> Iterator[str]:
    yield (
        "| alarm above | in a row | began in the 20 steps before the loss had doubled "
        "| began in 1,000 steps of the other runs |"
    )
    yield "|---|---|---|---|"
    for each in alarms(runs):
        yield (
            f"| {each.threshold:g} | {each.after} | {each.before} of {each.doubles} | "
            f"{each.elsewhere:.1f} |"
        )


def tables(runs: Runs) -> str:
    """All of them."""
    return "\n\n".join("\n".join(table(runs)) for table in TABLES)


TABLES = (within_table, combined_table, alarm_table)
