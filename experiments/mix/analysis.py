"""What the records of the experiment say: the advice, and whether training bears it out."""

from __future__ import annotations

import math

import numpy as np

from experiments.mix.run import NOTED
from experiments.training import Row
from megatron_sharpness.sweeps.mix.recommendation import Recommendation, recommend
from megatron_sharpness.sweeps.spread import Spread

TASKS = ("first", "second")
Runs = dict[str, list[Row]]


def sweep_of(runs: Runs) -> dict[float, dict[str, list[float]]]:
    """λ_c^{1→2} by share and task, of the batches at which both have a value."""
    found: dict[float, dict[str, list[float]]] = {}
    for name, rows in runs.items():
        if not name.startswith("sweep-"):
            continue
        whole = [row for row in rows if all(task in row for task in TASKS)]
        found[rows[0]["share"]] = {
            task: [float(row[task]) for row in whole] for task in TASKS
        }
    return dict(sorted(found.items()))


def advice_of(runs: Runs) -> Recommendation:
    return recommend(sweep_of(runs))


def predicted_rates(runs: Runs) -> dict[float, dict[str, float]]:
    """2/λ with the median λ, by share and task; 0 where the loss rises at once."""
    return {
        share: {task: 2.0 / Spread(tuple(values)).median for task, values in tasks.items()}
        for share, tasks in sweep_of(runs).items()
    }


def changes(runs: Runs, task: str, steps: int) -> dict[tuple[float, float], float]:
    """Change of a held-out loss after so many steps, by share and learning rate."""
    return {
        (row["share"], row["lr"]): float(row[f"change_{task}"])
        for name, rows in sorted(runs.items())
        if name.startswith("grid-")
        for row in rows
        if row["steps"] == steps
    }


def agreement(runs: Runs, task: str, steps: int) -> tuple[float, float]:
    """The part of the grid where a loss rises exactly where lr > 2/λ, and the part that the better
    of "always" and "never" has."""
    rates = predicted_rates(runs)
    cells = changes(runs, task, steps)
    rises = np.array([change > 0 for change in cells.values()])
    predicted = np.array([lr > rates[share][task] for share, lr in cells])
    return float((rises == predicted).mean()), float(max(rises.mean(), 1 - rises.mean()))


def thresholds(runs: Runs, task: str, steps: int) -> dict[float, float]:
    """By share, the learning rate at which a loss starts to rise: 0 where all raise it, and ∞ where
    none does. It is interpolated in ln lr, between the last that does not and the first that does.
    """
    cells = changes(runs, task, steps)
    found = {}
    for share in sorted({share for share, _ in cells}):
        lrs = sorted(lr for at, lr in cells if at == share)
        values = [cells[share, lr] for lr in lrs]
        first = next((i for i, value in enumerate(values) if value > 0), None)
        found[share] = math.inf if first is None else 0.0
        if first:
            part = -values[first - 1] / (values[first] - values[first - 1])
            found[share] = math.exp(np.interp(part, [0, 1], np.log(lrs[first - 1 : first + 1])))
    return found


def threshold_ratio(runs: Runs, task: str, steps: int) -> float:
    """Median over shares of the learning rate at which the loss starts to rise, over 2/λ."""
    rates = predicted_rates(runs)
    found = thresholds(runs, task, steps)
    ratios = [
        lr / rates[share][task]
        for share, lr in found.items()
        if 0 < lr < math.inf and rates[share][task]
    ]
    return float(np.median(ratios)) if ratios else math.nan


def roomiest(runs: Runs, steps: int) -> tuple[float, float]:
    """The trained share that takes the largest learning rate before one of the losses rises after
    so many steps, and that learning rate."""
    found = [thresholds(runs, task, steps) for task in TASKS]
    room = {share: min(found[0][share], found[1][share]) for share in found[0]}
    best = max(room, key=lambda share: room[share])
    return best, room[best]


def last_losses(runs: Runs) -> dict[str, tuple[float, float]]:
    """Held-out losses of both domains at the end of training on, by run."""
    return {
        name: (rows[-1]["first"], rows[-1]["second"])
        for name, rows in sorted(runs.items())
        if name.startswith(("fixed-", "adaptive-"))
    }


def regrets(runs: Runs) -> dict[str, float]:
    """For each run, how much the worse off of the two domains is above the best that any fixed
    share reaches on it, in nats."""
    losses = last_losses(runs)
    best = [
        min(pair[i] for name, pair in losses.items() if name.startswith("fixed-")) for i in (0, 1)
    ]
    return {name: max(pair[0] - best[0], pair[1] - best[1]) for name, pair in losses.items()}


def edges_of_adaptive(runs: Runs) -> dict[str, tuple[float, float]]:
    """Median λ·η/2 of both tasks while a controller adjusts the share: 1 where a step of the run's
    own learning rate is just one that raises the loss."""
    lr = advice_of(runs).lr
    found = {}
    for name, rows in runs.items():
        if name.startswith("adaptive-"):
            first, second = (
                Spread(tuple(float(row[key]) for row in rows if key in row)).median
                for key in ("sharpness_first", "sharpness_second")
            )
            found[name] = (first * lr / 2, second * lr / 2)
    return found


def tables(runs: Runs, names: dict[str, str]) -> str:
    """What the experiment found, for its README."""
    advice = advice_of(runs)
    low, high = advice.lr_interval
    first = names["first"]
    if advice.crossing is None:
        crossing = "do not cross"
    else:
        crossing = f"cross at {advice.crossing:.2f}"
        if advice.crossing_interval is not None:
            crossing += " ({:.2f} to {:.2f})".format(*advice.crossing_interval)
    votes = advice.votes[advice.share]
    lines = [
        f"Recommended: {advice.share:.0%} {first} (chosen in {votes:.0%} of the draws), "
        f"η ≤ {advice.lr:.2g} ({low:.2g} to {high:.2g}); the tasks {crossing}.",
        "",
        "| after | loss of | agreement over the grid | best constant answer | "
        f"starts to rise at η · λ/2 | roomiest share of {first}, η |",
        "|---|---|---|---|---|---|",
    ]
    for steps in NOTED:
        share, lr = roomiest(runs, steps)
        for task in TASKS:
            agreed, baseline = agreement(runs, task, steps)
            ratio = threshold_ratio(runs, task, steps)
            lines.append(
                f"| {steps} step{'s' if steps > 1 else ''} | {names[task]} | {agreed:.0%} | "
                f"{baseline:.0%} | {ratio:.2f} | {share:g}, {lr:.2g} |"
            )
    lines += [
        "",
        f"| trained on with | loss of {first} | loss of {names['second']} | worse off by |",
        "|---|---|---|---|",
    ]
    regret = regrets(runs)
    for name, pair in reversed(last_losses(runs).items()):
        kind, share = name.split("-")
        shown = f"{share} {first}"
        if kind == "adaptive":
            shown = f"{share} → {runs[name][-1]['share']:.2f}, adaptive"
        lines.append(f"| {shown} | {pair[0]:.3f} | {pair[1]:.3f} | {regret[name]:.3f} |")
    shown = "; ".join(
        f"from {runs[name][0]['share']:g}, {edges[0]:.2f} and {edges[1]:.2f}"
        for name, edges in edges_of_adaptive(runs).items()
    )
    lines += ["", f"λ · η/2 of the two tasks in the adaptive runs, median: {shown}."]
    return "\n".join(lines)
