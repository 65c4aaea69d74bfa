"""``python -m experiments.recurrence``: 21 trainings, their records and the figure."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, training
from experiments.recurrence import analysis
from experiments.recurrence.claims import GROWS, STAYS, claims
from experiments.recurrence.run import CASES, HELD_EVERY, JUMPS, STEPS, WIDTH, rows, trained

HERE = Path(__file__).parent
#: Curriculum → its name and colour.
SHOWN = {
    "1": ("plain", figures.MUTED), "8": ("depth 8", figures.GREEN),
    "doubled": ("depth 1, 2, 4, 8", figures.BLUE),
    "retrofit": ("depth 1, then 8", figures.PURPLE),
}  # fmt: skip


def draw(runs: analysis.Runs, path: Path) -> None:
    """λ_c along trainings of one seed, its rise at each jump, and held-out loss by its cost."""
    with figures.figure(path, 1, 3, height=4.2) as ((along, rises, costs),):
        for curriculum in ("1", "8", "doubled"):
            label, color = SHOWN[curriculum]
            shown = runs[f"injected-{curriculum}-same-0"]
            measured = np.isfinite(shown.sharpness[:STEPS])
            steps = np.flatnonzero(measured) + 1
            along.plot(steps, shown.sharpness[:STEPS][measured], ".-", color=color, label=label,
                       markersize=3, linewidth=0.7)  # fmt: skip
        for jump in JUMPS:
            along.axvline(jump, color=figures.MUTED, linewidth=1.0, linestyle=(0, (4, 2)))
        along.set_yscale("log")
        along.set_ylim(10, 4000)
        along.set_title(r"$\lambda_c$ along three trainings, injected")
        along.set_xlabel("step; dashed: the depth doubles")
        along.legend(loc="upper right", framealpha=1.0, edgecolor="none")
        _rises(rises, runs)
        for curriculum, (label, color) in SHOWN.items():
            for number, (each, _) in enumerate(analysis.pairs(runs, "injected", curriculum)):
                spent = analysis.cost(each)[HELD_EVERY - 1 :: HELD_EVERY] / 1000
                costs.plot(spent, each.held, color=color, linewidth=1.2,
                           label=None if number else label)  # fmt: skip
        costs.set_title("Held-out loss, injected, three seeds")
        costs.set_xlabel("thousand blocks passed forward")
        costs.set_ylim(1.8, 3.2)
        costs.legend(frameon=False)


def _rises(axis: Any, runs: analysis.Runs) -> None:
    shown = GROWS | STAYS
    for place, (loop, curriculum, jump) in enumerate(shown.values()):
        found = [analysis.rise(*each, jump) for each in analysis.pairs(runs, loop, curriculum)]
        _, color = SHOWN[curriculum]
        axis.plot(found, [place] * len(found), "o", color=color, markersize=5, alpha=0.8)
    for ratio in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8):
        axis.axvline(ratio, color=figures.MUTED, linewidth=1.0 if ratio == 1 else 0.3)
    axis.set_yticks(range(len(shown)), shown)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(1 / 9, 9)
    axis.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axis.minorticks_off()
    axis.set_title(r"$\lambda_c$ after / before, by plain's")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.recurrence")
    parser.add_argument("--large", action="store_true", help="width 256, into the folder large")
    large = parser.parse_args().large
    folder, width = (HERE / "large", 256) if large else (HERE, WIDTH)
    folder.mkdir(exist_ok=True)
    found = training.in_parallel(rows, {str(case): (case, width) for case in CASES})
    training.write(folder, found)
    draw(trained(found), folder / "figure.png")
    for claim, case, number, *_ in claims(found):
        print(f"{claim}: {case}: {number:.3g}")


if __name__ == "__main__":
    main()
