"""``python -m experiments.weight_decay``: records and figure; half a minute."""

from __future__ import annotations

from pathlib import Path

from experiments import figures, training
from experiments.weight_decay.run import BEYOND, DECAYS, edges, onset, run

FOLDER = Path(__file__).parent


def draw(runs: dict[str, list[training.Row]]) -> None:
    found = [edges(rows) for rows in runs.values()]
    with figures.figure(FOLDER / "figure.png", 1, 1) as axes:
        axis = axes[0][0]
        for field, label, style in (
            ("2/lr", r"$2/\eta$", {"color": figures.VERMILION}),
            ("2/lr - decay", r"$2/\eta-\gamma$", {"color": figures.VERMILION, "linestyle": "--"}),
            ("directional_sharpness", r"$\lambda_{dir}$",
             {"color": figures.ORANGE, "marker": "o", "linestyle": "none"}),
            ("hessian_sharpness", r"$\lambda_{max}^H$",
             {"color": figures.GREEN, "marker": "o", "linestyle": "none"}),
        ):  # fmt: skip
            axis.plot(DECAYS, [edge[field] for edge in found], label=label, **style)
        axis.set_xlabel(r"weight decay $\gamma$")
        axis.set_title("At the onset of oscillation")
        axis.legend(frameon=False)


def main() -> None:
    runs = {}
    for decay in DECAYS:
        first = onset(decay)
        runs[f"decay-{decay:g}"] = rows = run(decay, BEYOND * first)
        found = {field: round(value, 4) for field, value in edges(rows).items()}
        print(f"γ = {decay:g}: oscillates from η = {first:.4f}; at {BEYOND} times that {found}")
    training.write(FOLDER, runs)
    draw(runs)


if __name__ == "__main__":
    main()
