"""``python -m experiments.learning_rate``: all trainings, an hour; then tables and figures.

A command that is given again goes on where it was stopped.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from experiments import figures, training
from experiments.learning_rate.prediction import best, sweeps
from experiments.learning_rate.run import CHOSEN_ON, FIVE, RECORDS, TRIED_ON, read, run
from experiments.learning_rate.tables import tables
from experiments.learning_rate.verdicts import level
from megatron_sharpness.report.figure import RUN_COLORS
from megatron_sharpness.report.stages import smoothed
from megatron_sharpness.report.verdict import verdict_of

HERE = Path(__file__).parent
#: Of docs/reading.md.
FIVE_FIGURE = HERE.parents[1] / "docs" / "images" / "learning_rates.png"
COLORS = {4: figures.ORANGE, 16: figures.BLUE, 64: figures.GREEN}
MARKERS = {"adamw": "o", "muon": "s", "sgd": "^"}


def train_all() -> None:
    """What is not yet in the records, in a process a core."""
    RECORDS.mkdir(exist_ok=True)
    done = {(each.case, each.peak) for each in read()}
    missing = [
        (case, peak)
        for case in (FIVE, *CHOSEN_ON, *TRIED_ON)
        for peak in case.rates
        if (case, peak) not in done
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, torch.set_num_threads, (1,)) as pool:
        started = [pool.submit(run, case, peak) for case, peak in missing]
        for number, future in enumerate(as_completed(started), 1):
            each = future.result()
            with each.case.path.open("a") as file:
                file.write(each.to_json() + "\n")
            training.progress(f"{number} of {len(missing)}: {each.case} at {each.peak:g}")


def draw() -> None:
    """η/η_c in the stable phase against the learning rate, and what was lost there."""
    with figures.figure(HERE / "figure.png", 1, 2, height=4.6) as ((ratios, losses),):
        for case, sweep in sweeps(read()).items():
            if case == FIVE:
                continue
            lowest = min(each.final for each in sweep)
            style = {
                "color": COLORS[case.sequences], "marker": MARKERS[case.optimizer],
                "markersize": 3.5, "linewidth": 0.8, "alpha": 0.75,
            }  # fmt: skip
            levels = [level(each) for each in sweep]
            ratios.plot([each.peak / best(sweep) for each in sweep], levels, **style)
            losses.plot(levels, [each.final / lowest for each in sweep], **style)
        for axis in (ratios, losses):
            axis.set_xscale("log")
        ratios.set_yscale("log")
        ratios.set_ylim(1e-3, 3.0)
        ratios.set_xlim(1e-3, 1e3)
        ratios.set_xlabel("learning rate / best of the sweep")
        ratios.set_ylabel(r"median $\eta/\eta_c$, stable phase")
        losses.set_xlim(1e-2, 2.0)
        losses.set_ylim(0.98, 1.6)
        losses.axhline(1.1, color=figures.MUTED, linewidth=1.0, linestyle=(0, (4, 2)))
        losses.set_xlabel(r"median $\eta/\eta_c$, stable phase")
        losses.set_ylabel("final loss / lowest of the sweep")
        for label, style in (
            *[(f"{size} sequences", {"color": color}) for size, color in COLORS.items()],
            *[(name, {"color": figures.MUTED, "marker": m}) for name, m in MARKERS.items()],
        ):
            ratios.plot([], [], label=label, **style)
        ratios.legend(frameon=False, fontsize=9, loc="lower right")


def draw_five() -> None:
    """η/η_c and the loss of five learning rates, with their verdicts."""
    with figures.figure(FIVE_FIGURE, 2, 1, height=3.0, sharex=True) as axes:
        (ratio,), (loss,) = axes
        ratio.figure.set_size_inches(10, 6.4)
        five = sweeps(read())[FIVE]
        for each, color in zip(five, RUN_COLORS, strict=False):
            run = each.run
            steps, values = run.column("iteration"), run.column("lr_over_critical")
            ratio.plot(steps, values, ".", color=color, alpha=0.3)
            ratio.plot(steps, smoothed(values), color=color)
            label = f"{run.name}: {verdict_of(run).name.replace('learning rate ', '')}"
            loss.plot(steps, run.column("loss"), color=color, label=label)
        ratio.axhline(1.0, color=figures.MUTED, linewidth=1.1, linestyle=(0, (4, 2)))
        ratio.set_yscale("log")
        ratio.set_title(r"Learning rate over critical, $\eta/\eta_c$")
        loss.set_yscale("log")
        loss.set_title("Loss")
        loss.set_xlabel("iteration")
        loss.set_ylim(top=3e3)
        loss.legend(frameon=False, loc="upper right", fontsize=10, ncols=3)


if __name__ == "__main__":
    train_all()
    draw()
    draw_five()
    print(tables())
