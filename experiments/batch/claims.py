"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

import numpy as np

from experiments import training
from experiments.batch import run as batch
from experiments.gpt_wsd import run as gpt


def claims(runs: training.Runs) -> training.Found:
    own, other = (
        [np.median(batch.sharpness_of(rows, name)) for rows in runs.values()]
        for name in batch.BATCHES
    )
    sizes = [size * gpt.LENGTH for size in batch.SIZES]
    text = "λ_c grows with the size of the step's own batch (ours)"
    yield text, f"{sizes[-1]} tokens / {sizes[0]} tokens", own[-1] / own[0], 1.0, np.inf
    text = "and reads higher on another batch: λ_c there / on the step's own (ours)"
    for position in (0, -1):
        ratio = other[position] / own[position]
        yield text, f"{sizes[position]} tokens", ratio, 1.0, np.inf
    text = "four times the tokens about halve the scatter of log λ_c (ours)"
    scatter = [
        np.log(batch.sharpness_of(rows, batch.BATCHES[0])).std(ddof=1) for rows in runs.values()
    ]
    exponent, _ = np.polyfit(np.log(sizes), np.log(scatter), 1)
    yield text, "its factor for each", 4.0**exponent, 0.4, 0.65
