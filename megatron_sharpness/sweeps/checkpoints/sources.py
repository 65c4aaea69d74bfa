"""Where checkpoints are, and the flags by which a training command reads one."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sharpness.core.errors import InputError

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a series.

    Attributes:
        label: its name in files and figures.
        flags: that have the training command read it.
        iteration: of the training, where it is known.
        tokens: trained on, where its name tells.
        problem: why it cannot be read, if that can be seen from without.
    """

    label: str
    flags: tuple[str, ...]
    iteration: int | None = None
    tokens: float | None = None
    problem: str | None = None


def in_folder(folder: Path, iterations: Sequence[int] | None) -> list[Checkpoint]:
    """Those of Megatron's, or of ``launch/fsdp/train.py``'s, by iteration.

    Args:
        folder: of a run's ``--save``.
        iterations: which ones; all that there are if None.

    Raises:
        InputError: there are none, or not all that are asked for.
    """
    shown = f"--load {folder}"
    found = {
        int(path.name.removeprefix("iter_")): path
        for path in folder.glob("iter_*")
        if re.fullmatch(r"iter_\d+", path.name)
    }
    if not folder.is_dir():
        raise InputError(f"{shown}: there is no such folder; give the --save of a run")
    if not found:
        raise InputError(f"{shown}: it holds no iter_… folder; give the --save of a run")
    if not (folder / TRACKER).is_file():
        raise InputError(
            f"{shown}: there is no {TRACKER}, by which Megatron knows a folder of checkpoints; "
            f"write the number of an iteration into it, {max(found)} say"
        )
    for iteration in iterations or ():
        if iteration not in found:
            raise InputError(
                f"--iterations {iteration}: {folder} holds "
                f"{', '.join(map(str, sorted(found)))}; give some of these"
            )
    return [
        Checkpoint(
            label=found[iteration].name,
            flags=(
                *("--load", str(folder), "--ckpt-step", str(iteration)),
                "--exit-on-missing-checkpoint",
            ),
            iteration=iteration,
            problem=_problem(found[iteration]),
        )
        for iteration in sorted(iterations or found)
    ]


def _problem(path: Path) -> str | None:
    """What shows from without that a folder was not written to its end."""
    if [*path.glob("mp_rank_*")]:  # Megatron's older format
        return None
    missing = [".metadata"] if not (path / ".metadata").is_file() else []
    if not (path / "progress.json").is_file() and not (path / "metadata.json").is_file():
        missing.append("metadata.json (Megatron's) or progress.json (launch/fsdp/train.py's)")
    if missing:
        return f"half-written: {path} has no {' and no '.join(missing)}"
    return None


def of_hugging_face(models: Sequence[str], revisions: Sequence[str]) -> list[Checkpoint]:
    """Folders in the Hugging Face format, or revisions of one model on the hub, as given.

    Args:
        models: folders, or one name.
        revisions: of the one model; with ``*`` or ``?`` all branches that match, by tokens.

    Raises:
        InputError: names the flag, the value, the reason and the remedy.
    """
    if revisions and len(models) > 1:
        raise InputError(
            f"--hf-model {' '.join(models)}: --revisions are of one model; give one of them"
        )
    if revisions:
        names = _branches(models[0], revisions)
        flags = ("--hf-model", models[0], "--hf-revision")
        found = [_named(name, (*flags, name), None) for name in names]
    else:
        found = [
            _named(_tail(model, models), ("--hf-model", model), _incomplete(Path(model)))
            for model in models
        ]
    labels = [checkpoint.label for checkpoint in found]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{label}: two checkpoints have this name; give each once")
    return found


def _tail(model: str, models: Sequence[str]) -> str:
    """The part of a path by which it differs from the others."""
    parts = Path(model).parts
    tails = [parts[-n:] for n in range(1, len(parts) + 1)]
    others = [Path(other).parts for other in models if other != model]
    tail = next(
        (t for t in tails if all(other[-len(t) :] != t for other in others)), parts
    )  # fmt: skip
    return "/".join(tail)


def _named(name: str, flags: tuple[str, ...], problem: str | None) -> Checkpoint:
    """``stage1-step1000-tokens5B`` says where in the training it is."""
    step, tokens = re.search(r"step_?(\d+)", name), re.search(r"tokens_?(\d+)B", name)
    return Checkpoint(
        label=re.sub(r"[^\w.-]+", "-", name).strip("-"),
        flags=flags,
        iteration=int(step[1]) if step else None,
        tokens=int(tokens[1]) * 1e9 if tokens else None,
        problem=problem,
    )


def _branches(model: str, revisions: Sequence[str]) -> list[str]:
    if not any(set("*?[") & set(revision) for revision in revisions):
        return list(revisions)
    try:
        from huggingface_hub import list_repo_refs

        held = [branch.name for branch in list_repo_refs(model).branches]
    except (ImportError, OSError, ValueError) as error:
        raise InputError(
            f"--revisions {' '.join(revisions)}: the branches of {model} cannot be listed "
            f"({error}); give their names in full"
        ) from error
    return matching(held, revisions)


def matching(branches: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The branches that match, each once: pattern by pattern, and by the numbers in their names.

    Raises:
        InputError: none matches a pattern.
    """
    found: list[str] = []
    for pattern in patterns:
        names = [name for name in branches if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise InputError(
                f"--revisions {pattern}: no branch matches; there are, for example, "
                f"{', '.join(branches[:5])}"
            )
        found += sorted(
            names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]
        )
    return list(dict.fromkeys(found))


def _incomplete(folder: Path) -> str | None:
    """What a folder lacks; a name on the hub is none."""
    if not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json"
    index = folder / "model.safetensors.index.json"
    try:
        needed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ()
    except (ValueError, KeyError) as error:
        return f"half-written: {index}: {error}"
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        return f"half-written: {folder} has no {', '.join(missing)}"
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        return f"{folder} has no weights"
    return None
