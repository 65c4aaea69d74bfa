"""One recipe trained without and with measurements, and what became of it."""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.megatron.support import refuse_unsupported
from tests.megatron.harness import Run, finish, start
from tests.megatron.recipes.checkpoints import contents
from tests.megatron.recipes.small import (
    ITERATIONS,
    MASKED,
    NOT_HERE,
    SCRIPTS,
    Flags,
    Recipe,
    command_line,
    interval,
    processes,
    shrunk,
)

MASKED_WORDS = Path(__file__).parents[1] / "masked_words.py"

MEASURED = "--critical-sharpness-watch always"

#: Endings of a measurement that was made; the others say why it was not.
MADE = {"found", "not_descent", "no_upper", "no_lower", "noise_limited", "exhausted", "non_finite"}

NOT_OURS = "its trainer is another library's, which is not in the checkout"

#: Codes that Megatron ends with when it has found an error that it can repeat, or that it cannot.
FOUND_ERRORS = (16, 17)

OUTCOMES = {
    "measured": "trained bit for bit as without a measurement, and measured",
    "refused": "a measurement is refused at the start",
    "Megatron cannot": "does not train on the CPU, measured or not",
    "differs": "trained otherwise than without a measurement",
    "failed": "was not measured, or stopped by it",
}


@dataclass
class Trial:
    """What became of a recipe.

    Attributes:
        outcome: one of :data:`OUTCOMES`.
        reason: why it was not measured, or what differs.
        statuses: how its measurements ended.
        error: the line that the run ended with.
    """

    outcome: str
    reason: str | None = None
    statuses: list[str] = field(default_factory=list)
    error: str | None = None


def attempt(checkout: Path, recipe: Recipe, folder: Path, timeout: float) -> Trial:
    """Train the recipe both ways, side by side; what it wrote is kept unless it was measured."""
    shutil.rmtree(folder, ignore_errors=True)
    if refused := refusal(recipe.flags):
        return Trial("refused", refused)
    script = _script(checkout, recipe)
    if script is None:
        return Trial("Megatron cannot", NOT_OURS)
    every = interval(recipe.flags)
    plain, measured = _train(checkout, script, recipe, folder, (0, every), timeout)
    stop = error(plain)
    if refused := _refused_by_run(measured):
        return Trial("refused", refused, error=stop)
    if stop is not None:
        return Trial("Megatron cannot", _not_here(recipe.flags) or stop, error=stop)
    if stop := error(measured):
        return Trial("failed", f"the measured run stopped: {stop}", error=stop)
    records = _records(measured)
    statuses = [record["status"] for record in records]
    if found := differences(plain, measured):
        (again,) = _train(checkout, script, recipe, folder / "again", (0,), timeout)
        if set(found) <= set(differences(plain, again)):
            return Trial("Megatron cannot", "two unmeasured runs differ", statuses)
        return Trial("differs", "; ".join(found[:8]), statuses)
    reasons = [record["reason"] for record in records if record["status"] == "failed"]
    if reasons or not MADE & set(statuses):
        return Trial("failed", _tidy(reasons[0]) if reasons else "nothing was measured", statuses)
    shutil.rmtree(folder)
    return Trial("measured", statuses=statuses)


def _script(checkout: Path, recipe: Recipe) -> Path | None:
    paths = (checkout / name for name in SCRIPTS.get(recipe.model, ()))
    return next((path for path in paths if path.exists()), None)


def _train(
    checkout: Path, script: Path, recipe: Recipe, folder: Path, intervals: tuple[int, ...],
    timeout: float,
) -> list[Run]:  # fmt: skip
    flags = shrunk(recipe)
    arguments = (checkout / "megatron" / "training" / "arguments.py").read_text()
    if "--async-save" in flags and "async_strategy" in arguments:
        flags["--async-strategy"] = "mcore"
    observed = MASKED_WORDS if recipe.model in MASKED else script
    environment = {
        "OBSERVED_SCRIPT": str(observed),
        "OBSERVED_SITUATION": "memory_that_is_filled",
        "MASKED_WORDS": str(script),
    }
    started = {
        folder / str(every): start(
            folder / str(every), MEASURED * bool(every), model=" ".join(command_line(flags)),
            processes=processes(flags), every=every,
            environment={**recipe.environment, **environment},
        )
        for every in intervals
    }  # fmt: skip
    return [finish(ranks, place, timeout) for place, ranks in started.items()]


#: Flags whose values Megatron's arguments hold under another name.
NAMES = {"--fp8-format": "fp8", "--fp4-format": "fp4"}


def refusal(flags: Flags) -> str | None:
    """Why these flags cannot be measured with, whether or not a CPU could train with them."""
    try:
        refuse_unsupported(Namespace(**{
            NAMES.get(name, name.lstrip("-").replace("-", "_")): _parsed(value)
            for name, value in flags.items()
        }))  # fmt: skip
    except InputError as refused:
        return str(refused)
    return None


def _parsed(text: str) -> Any:
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    return True if text == "true" else text


def _refused_by_run(run: Run) -> str | None:
    found = re.search(r"^megatron_sharpness\.core\.errors\.\w+: (.*)", run.output, re.MULTILINE)
    return found[1] if found else None


def _records(run: Run) -> list[dict[str, Any]]:
    written = any((run.folder / "tensorboard").glob("*.jsonl"))
    return run.records if written else []


def _not_here(flags: Flags) -> str | None:
    return next((reason for flag, reason in NOT_HERE.items() if flag in flags), None)


def error(run: Run) -> str | None:
    """What stopped a run before it had made its steps, if anything did."""
    steps = len(run.training_lines)
    if (run.returncode == 0 and steps == ITERATIONS) or run.returncode in FOUND_ERRORS:
        return None
    # Where one rank has stopped, gloo stops the others.
    lines = re.findall(
        r"^[\w.]*(?:Error|Exception)\b(?!.*gloo).*|^\S+\.py: error: .*|^stopped: .*",
        run.output, re.MULTILINE,
    )  # fmt: skip
    return _tidy(lines[-1]) if lines else f"exit code {run.returncode} after {steps} steps"


def _tidy(line: str) -> str:
    """Without folders of this machine and modules above the one that it is about, and not long."""
    return re.sub(r"(?<![\w.])/[\w./+-]*/| when instantiating \w+", "", line)[:200]


def differences(plain: Run, other: Run) -> list[str]:
    """Names of all that training left and that is not the same, bit for bit."""
    found = [
        f"rank {rank}: {name}"
        for rank, (one, two) in enumerate(zip_longest(plain.hashes, other.hashes, fillvalue={}))
        for name in one.keys() | two.keys()
        if one.get(name) != two.get(name)
    ]
    if log(plain.output) != log(other.output):
        found.append("log")
    if plain.returncode != other.returncode:
        found.append("exit code")
    one, two = (contents(run.folder / "checkpoints") for run in (plain, other))
    found += [name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]
    return found


def log(output: str) -> list[list[str]]:
    """Megatron's lines of steps and of evaluations, without times."""
    lines = re.findall(r"(?:iteration +\d+/|\w+ loss at ).*", output)
    return [
        [part.strip() for part in line.split("|") if not re.search("time|throughput|power", part)]
        for line in lines
    ]
