"""The three runs of a verification, and what they come to."""

from __future__ import annotations

import json
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

#: What a verification writes.
PAGES = ("verify.json", "verify.md")


def trials(out: Path, iterations: int, every: int) -> dict[str, Trial]:
    """What is asked of each run, by its name.

    Raises:
        InputError: with these numbers nothing is measured.
    """
    if every < 1:
        raise InputError(f"--every {every}: an interval in iterations; give 1 or more")
    if iterations < max(every, 2):
        raise InputError(
            f"--iterations {iterations}: with --every {every} nothing would be measured; give at "
            f"least {max(every, 2)}"
        )
    return {
        name: Trial(out / name, every if measures else 0, iterations)
        for name, (measures, _) in RUNS.items()
    }


def begin(out: Path) -> bool:
    """Make the folder, without what another verification has said there; whether it was there.

    Raises:
        InputError: it cannot be written.
    """
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for page in PAGES:
            (out / page).write_text("")
            (out / page).unlink()
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; give another folder") from error
    return existed


def judge(out: Path, trials: dict[str, Trial], command: Sequence[str]) -> Verification:
    """Compare what the runs have written down, and write the page.

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
    verification = Verification(
        command=command,
        every=trials["measured"].every,
        facts=first.rank(0).facts,
        comparison=compare(first, second, measured),
        numbers=check(measured),
        cost=cost(first, second, measured),
    )
    document = json.dumps(verification.document(), indent=1, allow_nan=False)
    for name, text in zip(PAGES, (document + "\n", verification.page()), strict=True):
        (out / name).write_text(text, encoding="utf-8")
    return verification
