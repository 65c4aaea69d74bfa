"""``python -m experiments.slim_adam``: 33 trainings, their records and the figure; four minutes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments import figures, training
from experiments.slim_adam.run import (
    RATES,
    RULE_FROM,
    SEEDS,
    VARIANTS,
    held_out,
    means_of,
    rule,
    run,
    seeds_of,
)
from megatron_sharpness.core.measurement import OVER

FOLDER = Path(__file__).parent
COLORS = dict(
    zip(
        VARIANTS,
        (figures.BLUE, figures.GREEN, figures.PURPLE, figures.ORANGE, figures.VERMILION),
        strict=True,
    )
)


def train_all() -> training.Runs:
    """AdamW first: the rule is made from one of its runs."""
    done: training.Runs = {}
    for variants in (VARIANTS[:1], VARIANTS[1:]):
        runs = {}
        for variant in variants:
            means = means_of(variant, rule(done[RULE_FROM]) if done else [])
            for peak in RATES:
                for seed in seeds_of(variant):
                    runs[f"{variant}-{peak:g}-{seed}"] = (variant, peak, seed, means)
        done |= training.in_parallel(run, runs)
    return done


def draw(runs: training.Runs) -> None:
    with figures.figure(FOLDER / "figure.png", 1, 3, height=4.0) as ((ratios, losses, sharpness),):
        kinds = rule(runs[RULE_FROM])
        places = np.arange(len(kinds))
        for number, (over, color) in enumerate(
            zip(OVER, (figures.BLUE, figures.GREEN, figures.MUTED), strict=True)
        ):
            heights = [kind.ratios[over] for kind in kinds]
            ratios.barh(places + 0.27 * (1 - number), heights, 0.25, color=color, label=over)
        ratios.axvline(1.0, color=figures.VERMILION, linewidth=1.1, linestyle=(0, (4, 2)))
        ratios.set_yticks(places, [k.name.removesuffix(".weight").split(".")[-1] for k in kinds])
        ratios.set_xscale("log")
        ratios.set_xlabel(rf"SNR of second moments, $\eta$ = {RATES[0]:g}")
        ratios.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1.0))
        for variant, color in COLORS.items():
            found = np.array([held_out(runs, variant, peak) for peak in RATES])
            style = {"color": color, "marker": "o", "markersize": 4, "label": variant}
            half = np.ptp(found, axis=1) / 2
            losses.errorbar(RATES, found.mean(axis=1), half, capsize=3, **style)
            rows = runs[f"{variant}-{RATES[1]:g}-{SEEDS[0]}"]
            figures.curves(sharpness, rows, ["critical_sharpness"], color=color, label=variant)
        losses.set_xscale("log")
        losses.set_xticks(RATES, [f"{peak:g}" for peak in RATES], minor=False)
        losses.minorticks_off()
        losses.set_xlabel("peak learning rate")
        losses.set_ylabel("loss on held-out text")
        losses.legend(frameon=False)
        sharpness.set_yscale("log")
        sharpness.set_ylabel(r"$\lambda_c$")
        sharpness.set_xlabel(rf"step, $\eta$ = {RATES[1]:g}")


def main() -> None:
    training.write(FOLDER, train_all())
    draw(training.read(FOLDER))


if __name__ == "__main__":
    main()
