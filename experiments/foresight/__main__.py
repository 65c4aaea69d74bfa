"""``python -m experiments.foresight``: half an hour on two cores; then table and figure."""

from __future__ import annotations

from pathlib import Path

from experiments import training
from experiments.foresight.run import CASES, run

HERE = Path(__file__).parent

if __name__ == "__main__":
    training.write(HERE, training.in_parallel(run, {str(case): (case,) for case in CASES}))
