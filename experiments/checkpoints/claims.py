"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr

from experiments import training
from experiments.checkpoints import run as checkpoints


def claims(runs: training.Runs) -> training.Found:
    pairs = {
        beta1: (runs[f"in-run-{beta1:g}"], runs[f"own-moments-{beta1:g}"])
        for beta1 in (checkpoints.BETA1, *reversed(checkpoints.OTHERS))
    }
    ratios = np.concatenate([checkpoints.reproduction(*pair) for pair in pairs.values()])
    text = "from a checkpoint the first step measures what the training did: λ_c / its λ_c − 1"
    yield text, f"largest of {len(ratios)}", np.abs(ratios - 1).max(), 0.0, 1e-3
    text = "where nothing moves momentum raises λ_c (ours): steps 21 to 30 / in the run"
    for (beta1, pair), (lowest, highest) in zip(
        pairs.items(), ((2.0, 19.0), (1.5, 4.0), (0.7, 1.4)), strict=True
    ):
        late = np.median(checkpoints.drift(*pair)[20:])
        yield text, f"β₁ = {beta1:g}", late, lowest, highest
    own, warm = (
        checkpoints.medians(runs[f"{kind}-{checkpoints.BETA1:g}"])
        for kind in ("own-moments", "warm-moments")
    )
    there = checkpoints.in_run_medians(pairs[checkpoints.BETA1][0], own)
    text = "λ_c with warmed moments over checkpoints: rank correlation"
    for case, other, lowest in (("with own moments", own, 0.9), ("with the run's", there, 0.2)):
        correlation = spearmanr(list(warm.values()), list(other.values())).statistic
        yield text, case, correlation, lowest, 1.0
