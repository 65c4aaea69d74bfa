"""``python -m experiments.foresight``: half an hour on two cores; then tables and figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments import figures, training
from experiments.foresight.analysis import AHEAD, RIVALS, SIGNALS, Runs, spikes, within_runs
from experiments.foresight.run import CASES, run, trained
from experiments.foresight.tables import tables

HERE = Path(__file__).parent
SHOWN = "adamw-0.3-16-0-1-0.999"


def draw(runs: Runs) -> None:
    """A training whose loss spikes, and how well each signal tells it ahead."""
    with figures.figure(HERE / "figure.png", 1, 2, height=4.4) as ((one, areas),):
        shown = runs[SHOWN]
        steps = np.arange(1, len(shown.loss) + 1)
        one.plot(steps, shown.loss, color=figures.GREEN, label="loss")
        one.plot(steps, shown.ratio, ".", color=figures.BLUE, alpha=0.5, label=r"$\eta/\eta_c$")
        one.plot(steps, shown.grad_norm, color=figures.ORANGE, linewidth=0.8, label="gradient norm")
        for at in spikes(shown):
            one.axvline(at + 1, color=figures.MUTED, linewidth=1.0, linestyle=(0, (4, 2)))
        one.set_yscale("log")
        one.set_ylim(1e-2, 1e3)
        one.set_title("AdamW, η = 0.3, β₂ = 0.999")
        one.set_xlabel("step")
        one.legend(frameon=False, ncols=3, fontsize=9, loc="upper left")
        places = np.arange(len(SIGNALS))
        colors = (figures.VERMILION, figures.BLUE, figures.MUTED)
        for number, (ahead, color) in enumerate(zip(AHEAD, colors, strict=True)):
            found = within_runs(runs, ahead).values()
            means = [np.mean(each) for each in found]
            errors = [np.std(each, ddof=1) / len(each) ** 0.5 for each in found]
            areas.errorbar(
                means, places + 0.2 * (number - 1), xerr=errors, fmt="o", color=color,
                markersize=4, label=f"{ahead} ahead",
            )  # fmt: skip
        areas.axvline(0.5, color=figures.MUTED, linewidth=1.0, linestyle=(0, (4, 2)))
        areas.axhline(len(RIVALS) - 0.5, color=figures.MUTED, linewidth=0.6)
        areas.set_yticks(places, SIGNALS)
        areas.invert_yaxis()
        areas.set_xlabel("AUC within a training, 1/2 is chance")
        areas.set_title("Steps before a spike")
        areas.legend(frameon=False, fontsize=9)


def main() -> None:
    (HERE / "records").mkdir(exist_ok=True)
    made = training.in_parallel(run, {str(case): (case,) for case in CASES})
    for seed in {case.seed for case in CASES}:
        lines = [each.to_json() + "\n" for each in made.values() if each.case.seed == seed]
        (HERE / "records" / f"seed-{seed}.jsonl").write_text("".join(lines))
    rows = training.read(HERE).values()
    runs = trained(row for file in rows for row in file)
    draw(runs)
    print(tables(runs))


if __name__ == "__main__":
    main()
