"""``python -m experiments.fcn``: three runs, their records and the figure; four minutes."""

from __future__ import annotations

from pathlib import Path

from experiments import figures, training
from experiments.fcn.run import RUNS, run

FOLDER = Path(__file__).parent


def draw(runs: dict[str, list[training.Row]]) -> None:
    with figures.figure(FOLDER / "figure.png", 1, 3, sharey=True) as axes:
        for axis, name in zip(axes[0], RUNS, strict=True):
            axis.set_title(name.replace("-", " ").capitalize())
            figures.curves(axis, runs[name], ["critical_sharpness", "edge_of_stability"])
            fields = ["hessian_sharpness", "exact_directional_sharpness"]
            figures.curves(axis, runs[name], fields, marker="o")
            axis.set_ylim(0, 120)
            axis.set_xlabel("step")
        axes[0][0].legend(frameon=False, ncols=2)


def main() -> None:
    found = training.in_parallel(run, {name: (name,) for name in RUNS})
    training.write(FOLDER, found)
    draw(found)


if __name__ == "__main__":
    main()
