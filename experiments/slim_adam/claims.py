"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

import numpy as np

from experiments import training
from experiments.gpt_wsd import run as gpt
from experiments.slim_adam.run import RATES, RULE_FROM, SEEDS, held_out, rule, saved

PAPER = "(SlimAdam's paper)"


def claims(runs: training.Runs) -> training.Found:
    kinds = {kind.name: kind for kind in rule(runs[RULE_FROM])}
    text = f"queries, keys and what leads up favour fan_in, what leads down fan_out {PAPER}: ratio"
    for name, over, other in (
        ("qkv", "fan_in", "fan_out"), ("up", "fan_in", "fan_out"),
        ("proj", "fan_out", "fan_in"), ("down", "fan_out", "fan_in"),
    ):  # fmt: skip
        ratios = kinds[f"blocks.{name}.weight"].ratios
        yield text, f"{name}, SNR {over} / {other}", ratios[over] / ratios[other], 1.0, np.inf
    text = f"an embedding resists means over its tokens {PAPER}: SNR"
    ratios = kinds["embedding.weight"].ratios
    yield text, "over tokens", ratios["fan_out"], 0.0, 0.5
    yield text, "over channels", ratios["fan_in"], 1.0, np.inf
    text = f"larger learning rates lower the SNR {PAPER}: mean of the largest, over η = 0.002's"
    for peak in RATES[1:]:
        yield text, f"η = {peak:g}", lowered(runs, peak), 0.0, 1.0
    text = f"means do without nearly all second moments {PAPER}: share saved"
    yield text, "by its rule, SNR of 1", saved(list(kinds.values()), "slim"), 0.9, 1.0
    text = "and train to 0 to 5 % more loss, beyond the best rate to more (the paper: to the same)"
    for peak in RATES:
        lowest, highest = (1.0, 1.05) if peak < RATES[-1] else (1.05, np.inf)
        yield text, f"η = {peak:g}", ratio(runs, "slim", peak), lowest, highest
    text = "those of SNR 4 or more do without over half (ours): share saved"
    yield text, "by SNR of 4", saved(list(kinds.values()), "careful"), 0.5, 1.0
    text = "and train to the same loss at the rate that the rule was made at, not at others (ours)"
    for peak in RATES:
        lowest, highest = (0.985, 1.015) if peak == RATES[0] else (1.015, np.inf)
        yield text, f"η = {peak:g}", ratio(runs, "careful", peak), lowest, highest
    text = "other means do not (ours): held-out loss / AdamW's"
    for variant in ("one-mean", "opposite"):
        for peak in RATES:
            case = f"{variant.replace('-', ' ')}, η = {peak:g}"
            yield text, case, ratio(runs, variant, peak), 1.03, np.inf
    text = "SlimAdam's λ_c is near AdamW's (ours): median of the stable phase / AdamW's"
    for peak in RATES:
        factor = stable(runs, "slim", peak) / stable(runs, "adamw", peak)
        yield text, f"η = {peak:g}", factor, 0.7, 1.4


def ratio(runs: training.Runs, variant: str, peak: float) -> float:
    """Mean held-out loss over the seeds, over AdamW's with the same seeds."""
    own, adamw = held_out(runs, variant, peak), held_out(runs, "adamw", peak)
    return float(own.mean() / adamw[: len(own)].mean())


def lowered(runs: training.Runs, peak: float) -> float:
    """Geometric mean over kinds and seeds of the largest SNR, over that at the lowest rate."""

    def logs(rate: float) -> float:
        found = [
            np.log(max(kind.ratios.values()))
            for seed in SEEDS
            for kind in rule(runs[f"adamw-{rate:g}-{seed}"])
        ]
        return float(np.mean(found))

    return float(np.exp(logs(peak) - logs(RATES[0])))


def stable(runs: training.Runs, variant: str, peak: float) -> float:
    """Median λ_c of all seeds between warm-up and decay."""
    rows = [
        row
        for seed in SEEDS
        for row in runs[f"{variant}-{peak:g}-{seed}"]
        if gpt.WARMUP < row["iteration"] <= gpt.STEPS - gpt.DECAY
    ]
    return float(np.nanmedian(training.column(rows, "critical_sharpness")))
