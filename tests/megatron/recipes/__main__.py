"""Train the recipes of a Megatron-LM checkout without and with measurements, and compare.

    PYTHONPATH=.:CHECKOUT python -m tests.megatron.recipes CHECKOUT FOLDER [--only 20]
    python -m tests.megatron.recipes --page        what the page says of the committed results

What became of each stands in FOLDER/outcomes.json. A command that is given again goes on where it
was stopped; what a run wrote is kept beside it unless it was measured.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks.results import machine
from tests.megatron.recipes import results
from tests.megatron.recipes.small import Recipe, alike, trainings
from tests.megatron.recipes.trial import attempt


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.megatron.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkout", nargs="?", type=Path)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--only", type=int, metavar="N", help="N trainings, evenly spread")
    parser.add_argument("--matching", default="", metavar="TEXT", help="of recipes named so")
    parser.add_argument("--commit", help="of the checkout, where it has no .git")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one run")
    parser.add_argument("--page", action="store_true", help="print the page's tables, run nothing")
    arguments = parser.parse_args()
    if arguments.page:
        for path in results.COMMITTED:
            print(results.page(results.load(path)), end="\n\n")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the ranks, too
    groups = alike(trainings(arguments.checkout))
    groups = spread([g for g in groups if arguments.matching in g[0].title], arguments.only)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    train_all(arguments, groups, arguments.folder / "outcomes.json")


def spread(groups: list[list[Recipe]], number: int | None) -> list[list[Recipe]]:
    if number is None or number >= len(groups):
        return groups
    return [groups[i * len(groups) // number] for i in range(number)]


def train_all(arguments: argparse.Namespace, groups: list[list[Recipe]], path: Path) -> None:
    checkout, folder = arguments.checkout, arguments.folder
    document = results.load(path) if path.exists() else results.new(checkout, arguments.commit)
    done = {title for group in document["groups"] for title in group["recipes"]}
    commit = machine()["commit"]
    for number, group in enumerate(groups, 1):
        first = group[0]
        if first.title in done:
            continue
        begin = time.monotonic()
        trial = attempt(checkout, first, folder / first.model / first.name, arguments.timeout)
        document["groups"].append(results.entry(group, trial, commit))
        results.save(document, path)
        print(
            f"{number}/{len(groups)} {first.title} and {len(group) - 1} like it: {trial.outcome}"
            f" {trial.reason or ' '.join(trial.statuses)} ({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
    print(dict(results.counts(document)))


if __name__ == "__main__":
    main()
