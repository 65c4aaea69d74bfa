"""``python -m experiments.gpt_wsd``: six runs, their records and the figure; under 15 minutes."""

from __future__ import annotations

from pathlib import Path

from experiments import figures, training
from experiments.gpt_wsd.run import RATES, SCHEDULES, run

FOLDER = Path(__file__).parent
COLORS = dict(zip(RATES, (figures.GREEN, figures.BLUE, figures.PURPLE), strict=True))


def draw(runs: dict[str, list[training.Row]]) -> None:
    with figures.figure(FOLDER / "figure.png", 4, 2, height=2.6, sharex=True, sharey="row") as axes:
        for column, schedule in zip(axes.T, SCHEDULES, strict=True):
            column[0].set_title({"wsd": "Warm-up, stable, decay", "constant": "Constant"}[schedule])
            for peak, color in COLORS.items():
                rows = runs[f"{schedule}-{peak:g}"]
                line = {"color": color, "linewidth": 1.1, "linestyle": (0, (4, 2)), "label": None}
                style = {"color": color, "label": rf"$\eta$ = {peak:g}"}
                figures.curves(column[0], rows, ["critical_sharpness"], **style)
                dots = {"color": color, "label": None, "linestyle": "none", "marker": "o"}
                figures.curves(column[0], rows, ["exact_directional_sharpness"], **dots)
                figures.curves(column[0], rows, ["edge_of_stability"], **line)
                figures.curves(column[1], rows, ["preconditioned_sharpness"], marker="o", **style)
                figures.curves(column[1], rows, ["edge_of_stability_preconditioned"], **line)
                figures.curves(column[2], rows, ["lr_over_critical"], **style)
                figures.curves(column[3], rows, ["loss"], **style)
            column[0].set_yscale("log")
            column[1].set_yscale("log")
            column[2].axhline(1.0, color=figures.MUTED, linewidth=1.1, linestyle=(0, (4, 2)))
            column[3].set_xlabel("step")
        for axis, label in zip(
            axes[:, 0],
            (r"$\lambda_c$", r"$\lambda_{max}^{PH}$", r"$\eta/\eta_c$", "loss"),
            strict=True,
        ):
            axis.set_ylabel(label)
        axes[3][0].legend(frameon=False)


def main() -> None:
    runs = {f"{schedule}-{peak:g}": (schedule, peak) for schedule in SCHEDULES for peak in RATES}
    found = training.in_parallel(run, runs)
    training.write(FOLDER, found)
    draw(found)


if __name__ == "__main__":
    main()
