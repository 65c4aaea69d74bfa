"""``python -m experiments.parts``: records and figure; three minutes."""

from __future__ import annotations

from pathlib import Path

from experiments import figures, training
from experiments.parts.run import RUNS, of_part, parts_in, passes, run, stable_ratio

FOLDER = Path(__file__).parent
COLORS = {
    "norms": figures.VERMILION, "embeddings": figures.GREEN, "attention": figures.ORANGE,
    "mlp": figures.PURPLE, "muon": figures.ORANGE, "adamw": figures.GREEN,
}  # fmt: skip
TITLES = {"adamw": "AdamW", "muon": "Muon and AdamW"}


def draw(runs: dict[str, list[training.Row]]) -> None:
    with figures.figure(FOLDER / "figure.png", 1, len(RUNS), height=4.2, sharey=True) as axes:
        for axis, (optimizer, preset) in zip(axes[0], RUNS, strict=True):
            rows = runs[f"{optimizer}-{preset}"]
            whole = {"color": figures.BLUE, "linewidth": 2.4, "label": "whole"}
            figures.curves(axis, of_part(rows, None), ["lr_over_critical"], **whole)
            for part in parts_in(rows):
                own = {"color": COLORS[part], "label": part}
                figures.curves(axis, of_part(rows, part), ["lr_over_critical"], **own)
            axis.axhline(1.0, color=figures.MUTED, linewidth=1.1, linestyle=(0, (4, 2)))
            axis.set_yscale("log")
            axis.set_title(f"{TITLES[optimizer]}: {preset}")
            axis.set_xlabel("step")
            axis.legend(frameon=False, ncols=2)
        axes[0][0].set_ylabel(r"$\eta/\eta_c$ of each alone")


def main() -> None:
    runs = training.in_parallel(run, {"-".join(each): each for each in RUNS})
    training.write(FOLDER, runs)
    draw(runs)
    for name, rows in runs.items():
        ratios = {part: stable_ratio(rows, part) for part in (None, *parts_in(rows))}
        told = ", ".join(f"{part or 'whole'} {ratio:.3g}" for part, ratio in ratios.items())
        print(f"{name}: η/η_c {told}; {passes(rows):.2f} passes a part")


if __name__ == "__main__":
    main()
