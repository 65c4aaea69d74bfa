"""``python -m experiments.learning_rate``: all trainings, over an hour; then table and figure.

A command that is given again goes on where it was stopped.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from experiments import training
from experiments.learning_rate.run import CHOSEN_ON, FIVE, RECORDS, TRIED_ON, read, run


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


if __name__ == "__main__":
    train_all()
