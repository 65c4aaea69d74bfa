"""``python -m experiments.tracking``: four runs, their records and the figure; half a minute."""

from __future__ import annotations

from pathlib import Path

from experiments import figures, training
from experiments.tracking.run import RUNS, correlation, run

FOLDER = Path(__file__).parent


def draw(runs: dict[str, list[training.Row]]) -> None:
    with figures.figure(FOLDER / "figure.png", 2, 2, height=3.0, sharex=True) as axes:
        for axis, name in zip(axes.flat, RUNS, strict=True):
            size, peak = RUNS[name]
            axis.set_title(rf"batch of {size}, $\eta$ = {peak:g}: {correlation(runs[name]):.2f}")
            fields = ["critical_sharpness", "edge_of_stability", "preconditioned_sharpness"]
            figures.curves(axis, runs[name], [*fields, "edge_of_stability_preconditioned"])
            axis.set_yscale("log")
        axes[0][0].legend(frameon=False, ncols=2)


def main() -> None:
    runs = training.in_parallel(run, RUNS)
    training.write(FOLDER, runs)
    draw(runs)
    for name, rows in runs.items():
        print(f"{name}: rank correlation {correlation(rows):.3f}")


if __name__ == "__main__":
    main()
