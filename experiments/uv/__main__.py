"""``python -m experiments.uv``: train, write the records and draw the figure; ten seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments import figures, training
from experiments.uv.model import RUNS, orbits, run

FOLDER = Path(__file__).parent
#: Of the vertical axes; 2/η = 40 of the second run lies above.
LIMITS = {
    "sharpness-reduction": (2.5, 5.5),
    "progressive-sharpening": (-0.5, 5.0),
    "edge-of-stability": (0.0, 6.0),
}


def draw(runs: dict[str, list[training.Row]]) -> None:
    with figures.figure(FOLDER / "figure.png", 2, 2, height=3.2) as axes:
        for axis, name in zip(axes.flat, RUNS, strict=False):
            axis.set_title(name.replace("-", " ").capitalize())
            fields = ["edge_of_stability", "hessian_sharpness", "exact_directional_sharpness"]
            figures.curves(axis, runs[name], [*fields, "critical_sharpness"], marker=".")
            axis.set_ylim(*LIMITS[name])
            axis.set_xlabel("step")
        axes[0][0].legend(frameon=False)
        axis = axes[1][1]
        axis.set_title("Last outputs of gradient descent")
        rates = np.linspace(0.4, 0.95, 1101)
        last = orbits(rates)
        axis.plot(np.repeat(rates, last.shape[1]), last.ravel(), ",", color=figures.BLUE)
        axis.axvline(0.5, color=figures.VERMILION, linewidth=1.3)
        axis.set_xlabel(r"learning rate $\eta$")
        axis.set_ylabel("f")


def main() -> None:
    runs = {name: run(name) for name in RUNS}
    training.write(FOLDER, runs)
    draw(runs)


if __name__ == "__main__":
    main()
