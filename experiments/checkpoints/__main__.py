"""``python -m experiments.checkpoints [--work FOLDER]``: writes records and figure beside this."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, training
from experiments.checkpoints.run import (
    ACCUMULATED,
    BETA1,
    OTHERS,
    SOME,
    WARMUP,
    drift,
    in_run_medians,
    medians,
    series,
    train,
)

FOLDER = Path(__file__).parent
OTHER_COLORS = (figures.GREEN, figures.ORANGE)


def draw(runs: dict[str, list[training.Row]], path: Path) -> None:
    """λ_c of the training and of both series over the steps; how it goes on while nothing moves."""
    with figures.figure(path, 1, 2, height=3.9) as ((left, right),):
        _draw_series(left, runs)
        for beta1, color in ((BETA1, figures.BLUE), *zip(OTHERS, OTHER_COLORS, strict=True)):
            found = drift(*(runs[f"{kind}-{beta1:g}"] for kind in ("in-run", "own-moments")))
            steps = np.arange(1, len(found) + 1)
            right.plot(steps, found, "o-", color=color, markersize=3, label=rf"$\beta_1={beta1:g}$")
            right.axhline((1 + beta1) / (1 - beta1), color=color, linestyle=(0, (4, 2)),
                          linewidth=1)  # fmt: skip
        right.set_yscale("log")
        right.set_xlabel("steps taken back since the checkpoint")
        right.set_title(r"$\lambda_c$ / $\lambda_c$ in the run")
        right.legend(frameon=False, fontsize="small", loc=(0.72, 0.62))


def _draw_series(axis: Any, runs: dict[str, list[training.Row]]) -> None:
    rows = runs[f"in-run-{BETA1:g}"]
    steps, values, rates = (
        training.column(rows, field) for field in ("iteration", "critical_sharpness", "lr")
    )
    seen = steps > WARMUP / 2
    axis.plot(steps[seen], values[seen], color=figures.MUTED, linewidth=0.5, alpha=0.5)
    axis.plot(steps[seen], 2 / rates[seen], color=figures.VERMILION, linewidth=1.3,
              label=r"$2/\eta$")  # fmt: skip
    own = runs[f"own-moments-{BETA1:g}"]
    there = in_run_medians(rows, medians(own))
    axis.plot(list(there), list(there.values()), color=figures.MUTED, label="in the run")
    first = [row["sharpness"][0] for row in own]
    axis.plot(list(there), first, "x", color=figures.BLUE, label="own moments, first step")
    for kind, color in (("own-moments", figures.BLUE), ("warm-moments", figures.PURPLE)):
        found = medians(runs[f"{kind}-{BETA1:g}"])
        axis.plot(list(found), list(found.values()), "o-", color=color,
                  label=kind.replace("-", " "))  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_title(r"$\lambda_c$")
    axis.legend(frameon=False, fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes records and figure.")
    parser.add_argument("--work", type=Path, help="keeps the checkpoints; a series goes on there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        runs = {}
        for beta1 in (BETA1, *OTHERS):
            runs[f"in-run-{beta1:g}"] = train(work, beta1)
            some = () if beta1 == BETA1 else SOME
            runs[f"own-moments-{beta1:g}"] = series(work, beta1, "checkpoint", some)
        runs[f"warm-moments-{BETA1:g}"] = series(work, BETA1, f"warm:{ACCUMULATED}")
    training.write(FOLDER, runs)
    draw(training.read(FOLDER), FOLDER / "figure.png")


if __name__ == "__main__":
    main()
