"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

import numpy as np

from experiments import training
from experiments.foresight import tables as foresight
from experiments.foresight.analysis import RIVALS, alarms, foretold, within_runs
from experiments.foresight.run import trained


def claims(runs: training.Runs) -> training.Found:
    known = trained(row for rows in runs.values() for row in rows)
    text = "η/η_c alone tells a spike no better than loss and gradient norm (ours): AUC − theirs"
    for ahead in (1, 5):
        areas = {name: np.mean(found) for name, found in within_runs(known, ahead).items()}
        rival = max(areas[name] for name in RIVALS)
        yield text, f"{ahead} ahead", areas["η/η_c"] - rival, -0.5, 0.02
    chosen, tried = foresight.apart(known)
    text = "beside them it adds (ours): AUC of all three − of the two, in other trainings"
    for ahead in (1, 5):
        two, three = (
            foretold(chosen, tried, ahead, foresight.COMBINED[name]).area
            for name in ("loss and gradient norm", "loss, gradient norm and η/η_c")
        )
        yield text, f"{ahead} ahead", three - two, 0.03, 1.0
    text = "above 1 twice in a row before the loss has doubled (ours): share of trainings"
    warned = next(each for each in alarms(known) if (each.threshold, each.after) == (1.0, 2))
    yield text, f"{warned.doubles} trainings", warned.before / warned.doubles, 0.85, 1.0


#: Folder → the claims about its records.
