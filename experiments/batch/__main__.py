"""``python -m experiments.batch``: records and figure; two minutes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from experiments import figures, training
from experiments.batch.run import BATCHES, SIZES, run, sharpness_of
from experiments.gpt_wsd.run import LENGTH

FOLDER = Path(__file__).parent


def draw(runs: dict[str, list[training.Row]]) -> None:
    with figures.figure(FOLDER / "figure.png", 1, 1) as axes:
        axis = axes[0][0]
        for batch, color in zip(BATCHES, (figures.BLUE, figures.VERMILION), strict=True):
            found = [sharpness_of(rows, batch) for rows in runs.values()]
            tokens = np.array(SIZES) * LENGTH
            axis.plot(tokens, [np.median(v) for v in found], color=color, label=f"{batch} batch")
            for number, values in zip(tokens, found, strict=True):
                axis.plot([number] * len(values), values, ".", color=color, alpha=0.5)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens in the batch")
        axis.set_title(r"$\lambda_c$")
        axis.legend(frameon=False)


def main() -> None:
    runs = training.in_parallel(run, {f"sequences-{size:03d}": (size,) for size in SIZES})
    training.write(FOLDER, runs)
    draw(runs)
    for name, rows in runs.items():
        for batch in BATCHES:
            values = sharpness_of(rows, batch)
            statuses = Counter(row["status"] for row in rows if row["batch"] == batch)
            print(
                f"{name}, {batch}: {values[0]:.4g} / {np.median(values):.4g} / {values[-1]:.4g}",
                dict(statuses),
            )


if __name__ == "__main__":
    main()
