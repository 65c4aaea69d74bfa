"""What a folder's results are measured with: with the same a sweep goes on there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from megatron_sharpness.core.errors import InputError, flag_of

#: Launchers' flags with a value that say where processes run, meet and log, and not how many.
_PLACES = {
    *("--master-addr", "--master-port", "--node-rank", "--local-addr"),  # torchrun's
    *("--rdzv-backend", "--rdzv-conf", "--rdzv-endpoint", "--rdzv-id"),
    *("--max-restarts", "--monitor-interval", "--local-ranks-filter"),
    *("--log-dir", "--redirects", "-r", "--tee", "-t"),
    *("--jobid", "--job-name", "-J", "--nodelist", "-w", "--exclude", "--time"),  # srun's
    *("--output", "-o", "--error", "-e"),
    *("--host", "--hostfile"),  # mpirun's
}
#: The same in words of their own: ``env MASTER_PORT=1``.
_WORDS = re.compile(r"env|--standalone|(MASTER_ADDR|MASTER_PORT|NODE_RANK)=.*")


def keep_settings(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder and write what is measured with, or refuse to go on with something else.

    While nothing is measured there, the settings are those that were given last.

    Raises:
        InputError: the folder cannot be written, or holds what was measured otherwise.
    """
    path = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not _is_measured(out):
            path.write_text(json.dumps(settings, indent=2) + "\n")
            return
        before = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; give another folder") from error
    if found := list(_changes(before, settings)):
        raise InputError(
            f"--out {out}: it holds what was measured otherwise: {'; '.join(found)}. Give the "
            "same, or another folder"
        )


def _is_measured(out: Path) -> bool:
    """Whether a run has come to its end: its records lie beside its log then."""
    return any(records.with_suffix(".log").exists() for records in out.glob("*.jsonl"))


def _changes(before: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        old = before.get(name)
        if name == "training":
            changes = list(_changed_arguments(_arguments(old or ()), _arguments(value)))
            if changes:
                yield f"the training command {', and '.join(changes)}"
        elif old != value:
            yield f"{flag_of(name)} is {_shown(value)} and was {_shown(old)}"


def _shown(value: Any) -> str:
    if value in (None, []):
        return "not given"
    return " ".join(value) if isinstance(value, list) else str(value)


def _changed_arguments(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    for change, i, j, k, m in matcher.get_opcodes():
        had, has = " ".join(old[i:j]), " ".join(new[k:m])
        if change == "replace":
            yield f"has {has} where it had {had}"
        elif change == "insert":
            yield f"has {has}, which it did not have"
        elif change == "delete":
            yield f"has no {had}, which it had"


def _arguments(command: Sequence[str]) -> list[str]:
    """What of a training command can change a measurement, each flag together with its values."""
    end = _script(command)
    launcher, words = [], iter(command[:end])
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag.replace("_", "-") in _PLACES:
            if not equals:
                next(words, None)
        elif not _WORDS.fullmatch(word):
            launcher.append(word)
    return [shlex.join(group) for part in (launcher, command[end:]) for group in _grouped(part)]


def _script(command: Sequence[str]) -> int:
    """Where the launcher's words end, and those of what it launches begin."""
    for i, word in enumerate(command):
        is_module = i > 0 and command[i - 1] == "-m" and not word.startswith("torch.distributed.")
        if is_module or word.endswith((".py", ".sh")):
            return i
    return len(command)


def _grouped(words: Sequence[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for word in words:
        if not groups or re.match("--?[A-Za-z]", word):
            groups.append([])
        groups[-1].append(word)
    return groups
