"""The three runs of a verification, and what they come to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.trial import Trial
from megatron_sharpness.verify.cost import cost
from megatron_sharpness.verify.differences import compare
from megatron_sharpness.verify.number import check
from megatron_sharpness.verify.page import Verification
from megatron_sharpness.verify.traces import Trace

#: The runs by the name of their folder: whether they measure, and what progress calls them.
RUNS = {
    "plain-1": (False, "without measurement"),
    "plain-2": (False, "without measurement again"),
    "measured": (True, "with measurement"),
}

#: What a run leaves in its folder.
_WRITTEN = ("log.txt", "rank-*.jsonl", "critical_sharpness.jsonl", "tensorboard")

#: What a verification writes.
PAGES = ("verify.json", "verify.md")


def trials(
    out: Path, iterations: int, every: int, names: tuple[str, str] = ("--iterations ", "--every ")
) -> dict[str, Trial]:
    """What is asked of each run, by its name.

    Args:
        out: folder.
        iterations, every: of each run, and between the measurements of the last.
        names: what the user knows the two as.

    Raises:
        InputError: with these numbers nothing is measured.
    """
    if every < 1:
        raise InputError(f"{names[1]}{every}: an interval in iterations; give 1 or more")
    if iterations < max(every, 2):
        raise InputError(
            f"{names[0]}{iterations}: with {names[1]}{every} nothing would be measured; give at "
            f"least {max(every, 2)}"
        )
    return {
        name: Trial(out / name, every if measures else 0, iterations)
        for name, (measures, _) in RUNS.items()
    }


def begin(out: Path) -> bool:
    """Make the folder, without what another verification has left there; whether it was there.

    Raises:
        InputError: it cannot be written, or holds what no verification has written.
    """
    existed = out.exists()
    try:
        for name in RUNS:
            for path in (out / name).glob("*"):
                if not any(path.match(ours) for ours in _WRITTEN):
                    raise InputError(
                        f"--out {out}: {path} would be lost, which verify has not written; give "
                        "another folder"
                    )
            shutil.rmtree(out / name, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        for page in PAGES:
            (out / page).write_text("")
            (out / page).unlink()
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; give another folder") from error
    return existed


def judge(out: Path, trials: dict[str, Trial], command: Sequence[str]) -> Verification:
    """Compare what the runs have written down.

    Raises:
        InputError: it is not there, or cannot be compared.
    """
    first, second, measured = (Trace.of(trial.folder) for trial in trials.values())
    if not first.ranks == second.ranks == measured.ranks:
        raise InputError(f"{out}: the runs had different numbers of processes")
    made = [run.rank(0).made for run in (first, second, measured)]
    if not all(made):
        raise InputError(f"{out}: a run has made no iteration; see the logs there")
    if not made[0] == made[1] == made[2]:
        raise InputError(
            f"{out}: the runs have made different iterations: {' / '.join(map(str, made))}; see "
            "the logs there"
        )
    asked = trials["measured"].iterations
    if len(made[0]) < asked:
        raise InputError(
            f"{out}: the training was over after {len(made[0])} iterations, and {asked} were asked "
            "for; give fewer, or a longer training"
        )
    return Verification(
        command=command,
        every=trials["measured"].every,
        facts=first.rank(0).facts,
        comparison=compare(first, second, measured),
        numbers=check(measured),
        cost=cost(first, second, measured),
    )


def write(out: Path, found: Verification) -> None:
    """Write the page and the JSON."""
    document = json.dumps(found.document(), indent=1, allow_nan=False)
    for name, text in zip(PAGES, (document + "\n", found.page()), strict=True):
        (out / name).write_text(text, encoding="utf-8")
