"""``python -m experiments.adam_edge``: three runs, their records and the figure; a minute."""

from __future__ import annotations

from pathlib import Path

from experiments import figures, training
from experiments.adam_edge.run import RATES, plateau, run

FOLDER = Path(__file__).parent


def draw(runs: dict[str, list[training.Row]]) -> None:
    with figures.figure(FOLDER / "figure.png", 1, 3) as axes:
        for axis, (beta1, lr) in zip(axes[0], RATES.items(), strict=True):
            axis.set_title(rf"$\beta_1$ = {beta1:g}, $\eta$ = {lr:g}")
            rows = runs[f"beta1-{beta1:g}"]
            figures.curves(
                axis, rows,
                ["critical_sharpness", "edge_of_stability", "edge_of_stability_preconditioned"],
            )  # fmt: skip
            figures.curves(axis, rows, ["preconditioned_sharpness"], marker="o")
            axis.set_yscale("log")
            axis.set_xlabel("step")
        axes[0][2].legend(frameon=False, ncols=2)


def main() -> None:
    found = training.in_parallel(run, {f"beta1-{beta1:g}": (beta1,) for beta1 in RATES})
    training.write(FOLDER, found)
    draw(found)
    for name, rows in found.items():
        print(name, {field: round(value, 3) for field, value in plateau(rows).items()})


if __name__ == "__main__":
    main()
