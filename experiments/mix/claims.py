"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments import training
from experiments.mix import analysis as mix


def claims(runs: training.Runs) -> training.Found:
    both = {
        "prose": ("prose", "code", runs),
        "WikiText-2": ("WikiText-2", "GSM8K", training.read(Path(__file__).parent / "text")),
    }
    text = "the tasks' λ_c^{1→2} cross at a share of the old data (Fig. 6 a)"
    for first, (_, second, found) in both.items():
        crossing = mix.advice_of(found).crossing
        yield text, f"{first} with {second}", np.nan if crossing is None else crossing, 0.5, 0.95
    one = "one step raises a held-out loss where η > 2/λ_c^{1→2}: agreement over shares and η"
    for steps, text, lowest in (
        (1, one, 0.9), (100, "and 100 steps of training do, less clearly (Fig. 6 b, c)", 0.7),
    ):  # fmt: skip
        for *names, found in both.values():
            for task, name in zip(mix.TASKS, names, strict=True):
                agreed, constant = mix.agreement(found, task, steps)
                yield text, f"{name} (one answer for all: {constant:.2f})", agreed, lowest, 1.0
