"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

import numpy as np

from experiments import training
from experiments.parts import run as parts


def claims(runs: training.Runs) -> training.Found:
    text = "attention breaks first, alone (ours): its η/η_c / that of the part"
    for optimizer, others in (("AdamW", ("mlp", "embeddings", "norms")), ("Muon", ("mlp",))):
        rows = runs[f"{optimizer.lower()}-modules"]
        first = parts.stable_ratio(rows, "attention")
        for part in others:
            ratio = first / parts.stable_ratio(rows, part)
            yield text, f"{optimizer}, {part}", ratio, 1.05, np.inf
    rows = runs["muon-groups"]
    ratio = parts.stable_ratio(rows, "muon") / parts.stable_ratio(rows, "adamw")
    yield "Muon's group breaks before AdamW's (ours)", "at one learning rate", ratio, 1.05, np.inf
    text = "a part takes as many forward passes (ours)"
    for name, rows in runs.items():
        yield text, name.replace("-", ", "), parts.passes(rows), 2.0, 3.0
