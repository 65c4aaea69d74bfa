"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr

from experiments import training
from experiments.fcn.claims import STAY_BELOW
from experiments.gpt_wsd import run as gpt

DECAY = "λ_c rises when the learning rate decays, and not without: λ_c at the end / stable phase"


def claims(runs: training.Runs) -> training.Found:
    for peak in gpt.RATES:
        rows = [row for row in runs[f"wsd-{peak:g}"] if row["iteration"] > 2 * gpt.WARMUP]
        share = np.nanmax(training.column(rows, "lr_over_critical"))
        yield f"{STAY_BELOW}, at most", f"GPT, η = {peak:g}", share, 0.1, 0.95
    for schedule, lowest, highest in (("wsd", 1.3, np.inf), ("constant", 0.6, 1.2)):
        for peak in gpt.RATES:
            ratio = rise(runs[f"{schedule}-{peak:g}"])
            yield DECAY, f"{schedule}, η = {peak:g}", ratio, lowest, highest
    everything = [
        row
        for name, rows in runs.items()
        for row in rows
        # until the decay both schedules are one run
        if "preconditioned_sharpness" in row
        and ("wsd" in name or row["iteration"] > gpt.STEPS - gpt.DECAY)
    ]
    correlation = spearmanr(
        training.column(everything, "critical_sharpness"),
        training.column(everything, "preconditioned_sharpness"),
    ).statistic
    text = "λ_c and λ_max^PH order runs and phases alike (Fig. 1): rank correlation"
    yield text, f"{len(everything)} records of six runs", correlation, 0.7, 1.0


def rise(rows: list[training.Row]) -> float:
    """Median λ_c in the last 20 steps over that in the 100 steps before a decay would begin."""
    steps, values = training.column(rows, "iteration"), training.column(rows, "critical_sharpness")
    decay = gpt.STEPS - gpt.DECAY
    stable = np.nanmedian(values[(steps > decay - 100) & (steps <= decay)])
    return float(np.nanmedian(values[steps > gpt.STEPS - 20]) / stable)
