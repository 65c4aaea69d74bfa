"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

import numpy as np

from experiments import training
from experiments.learning_rate import prediction as rates
from experiments.learning_rate import verdicts
from experiments.learning_rate.run import FIVE, Training
from megatron_sharpness.report.verdict import DIVERGED, FAR_TOO_LOW, verdict_of


def claims(runs: training.Runs) -> training.Found:
    known = rates.sweeps(Training.from_row(row) for rows in runs.values() for row in rows)
    five = known.pop(FIVE)
    on, tried = rates.apart(known)
    text = (
        "at the best learning rate η/η_c is one value for an optimizer and a batch size (ours): "
        "largest / smallest"
    )
    groups = {
        f"{optimizer}, {sequences}": sweeps
        for (optimizer, sequences), sweeps in verdicts.by_optimizer_and_batch(known).items()
        if len(sweeps) > 1
    }
    for case, sweeps in groups.items():
        yield text, case, verdicts.spread(map(verdicts.at_best, sweeps)), 1.0, 2.0
    text = "while the best learning rates themselves differ (ours): largest / smallest"
    for case, sweeps in groups.items():
        yield text, case, verdicts.spread(map(rates.best, sweeps)), 1.0, np.inf
    found = rates.outcome(rates.by_ratio(rates.chosen_target(on)), tried)
    text = "three short trainings' η/η_c do not predict it (ours): share within a factor of 2"
    yield text, f"{len(tried)} sweeps", found.within / len(tried), 0.0, 0.89
    counted = verdicts.confusion(tried.values())
    text = "the verdict of a report is right (ours): share of trainings"
    yield text, f"all {sum(counted.values())}", verdicts.right(counted), 0.6, 1.0
    for name in (FAR_TOO_LOW, DIVERGED):
        yield text, name, verdicts.right(counted, [name]), 0.95, 1.0
    text = "five learning rates have five verdicts (ours)"
    yield text, "different ones", len({verdict_of(each.run).name for each in five}), 5, 5
