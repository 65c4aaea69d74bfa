"""``python -m experiments.warmup``: all trainings, the figures and tables.

A command that is given again goes on where it was stopped; ``--large`` trains a larger GPT for
longer, with more seeds, and keeps all of it in ``large/``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from experiments import training
from experiments.warmup import drawing, tables
from experiments.warmup.run import DEFAULT, LARGE, MODELS, OPTIMIZERS, Problem, run, start

HERE = Path(__file__).parent


def train_all(folder: Path, large: bool) -> training.Runs:
    """What is not yet in the records, seed by seed."""
    folder.mkdir(exist_ok=True)
    size = LARGE if large else DEFAULT
    # the GPT takes longest
    pairs = [(model, optimizer) for model in reversed(MODELS) for optimizer in OPTIMIZERS]
    for seed in range(size.seeds):
        problems = {f"{m}-{o}-{seed}": Problem(m, o, seed, size) for m, o in pairs}
        train_missing(folder, run, problems)
    train_missing(folder, start, {f"start-{m}-{o}": Problem(m, o, 0, size) for m, o in pairs})
    return training.read(folder)


def train_missing(
    folder: Path, function: Callable[[Problem], list[training.Row]], problems: dict[str, Problem]
) -> None:
    missing = {
        name: (problem,)
        for name, problem in problems.items()
        if not (folder / "records" / f"{name}.jsonl").exists()
    }
    training.write(folder, training.in_parallel(function, missing))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.warmup", description=__doc__)
    parser.add_argument("--large", action="store_true", help="768 steps, a GPT of four layers")
    large = parser.parse_args().large
    folder = HERE / "large" if large else HERE
    runs = train_all(folder, large)
    drawing.draw(folder / "figure.png", runs)
    drawing.draw_savings(folder / "savings.png", runs)
    for table in (tables.starts, tables.savings):
        print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
