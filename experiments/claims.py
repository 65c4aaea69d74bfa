"""``python -m experiments.claims``: the paper's claims beside what the committed records say."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import training

HERE = Path(__file__).parent
#: In the order of the table.
EXPERIMENTS = (
    "uv", "fcn", "adam_edge", "weight_decay", "phase_diagram", "tracking", "gpt_wsd",
    "batch", "mix", "checkpoints", "parts", "learning_rate", "foresight", "warmup",
    "slim_adam", "recurrence",
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and one number of ours that bears it out, or does not."""

    experiment: str
    text: str
    case: str
    measured: float
    lowest: float
    highest: float

    @property
    def holds(self) -> bool:
        return self.lowest <= self.measured <= self.highest


@functools.cache
def claims() -> tuple[Claim, ...]:
    """All claims, from ``experiments/*/records``."""
    return tuple(
        Claim(name, text, case, float(measured), lowest, highest)
        for name in EXPERIMENTS
        for text, case, measured, lowest, highest in _found(name)
    )


def _found(experiment: str) -> training.Found:
    claimed: training.Found = importlib.import_module(f"experiments.{experiment}.claims").claims(
        training.read(HERE / experiment)
    )
    return claimed


def table() -> str:
    """All claims as a Markdown table, for the README of the experiments."""
    lines = ["| claim | measured | holds in | where |", "|---|---|---|---|"]
    for name in EXPERIMENTS:
        lines += [f"{row} [{name}]({name}/README.md) |" for row in rows(name)]
    return "\n".join(lines)


def table_of(experiment: str) -> str:
    """The claims about one experiment, for its own README."""
    return "\n".join(["| claim | measured | holds in |", "|---|---|---|", *rows(experiment)])


def rows(experiment: str) -> Iterator[str]:
    """A row for each claim, all cases in it."""
    found = (claim for claim in claims() if claim.experiment == experiment)
    for text, group in itertools.groupby(found, key=lambda claim: claim.text):
        cases = list(group)
        measured = "; ".join(f"{claim.case}: {claim.measured:#.3g}" for claim in cases)
        ranges = "; ".join(dict.fromkeys(_range(claim) for claim in cases))
        yield f"| {text} | {measured} | {ranges} |"


def _range(claim: Claim) -> str:
    if claim.highest == np.inf:
        return f"> {claim.lowest:g}"
    return f"{claim.lowest:g} to {claim.highest:g}"


if __name__ == "__main__":
    print(table())
