"""What became of all recipes of a checkout: a JSON file, and the tables that are made of it."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.results import machine, markdown
from tests.megatron.recipes.small import Recipe, dropped, processes, shrunk
from tests.megatron.recipes.trial import OUTCOMES, Trial

COMMITTED = sorted(Path(__file__).parent.glob("*.json"))

#: Columns of the table → folders of recipes.
KINDS = {
    "GPT": ("gpt",),
    "experts": ("moe", "mixtral"),
    "BERT, T5": ("bert", "t5"),
    "hybrid": ("hybrid", "nemotron"),
    "others": ("gpt-nemo", "mimo", "multimodal-llava"),
}

Document = dict[str, Any]


def new(checkout: Path, commit: str | None) -> Document:
    """What a file begins with: of what, where and with what."""
    here = machine()
    return {
        "checkout": checkout.name,
        "checkout_version": version(checkout),
        "checkout_commit": commit or _commit(checkout),
        "commit": here["commit"],
        "versions": here["versions"],
        "groups": [],
    }


def version(checkout: Path) -> str:
    text = (checkout / "megatron" / "core" / "package_info.py").read_text()
    return ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, re.MULTILINE))


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def entry(group: list[Recipe], trial: Trial, commit: str) -> dict[str, Any]:
    """A group of recipes that are alike, and what became of the first one."""
    return {
        **asdict(trial),
        "processes": processes(shrunk(group[0])),
        "commit": commit,
        "recipes": {
            recipe.title: {why: " ".join(flags) for why, flags in dropped(recipe).items() if flags}
            for recipe in group
        },
    }


def counts(document: Document) -> Counter[str]:
    """Recipes by outcome."""
    counted = Counter(dict.fromkeys(OUTCOMES, 0))
    for group in document["groups"]:
        counted[group["outcome"]] += len(group["recipes"])
    return counted


def table(document: Document) -> str:
    """Recipes by outcome, reason and kind of model."""
    cells: Counter[tuple[str, str, str]] = Counter()
    for group in document["groups"]:
        for title in group["recipes"]:
            cells[group["outcome"], _class(group), _kind(title)] += 1
    order = list(OUTCOMES)
    totals = Counter[tuple[str, str]]()
    for (outcome, reason, _), number in cells.items():
        totals[outcome, reason] += number
    rows = [
        [outcome, reason, *(cells[outcome, reason, kind] or "" for kind in KINDS), total]
        for (outcome, reason), total in sorted(
            totals.items(), key=lambda row: (order.index(row[0][0]), -row[1], row[0][1])
        )
    ]
    columns = [sum(n for (*_, of), n in cells.items() if of == kind) for kind in KINDS]
    rows.append(["all", "", *columns, sum(columns)])
    return markdown(["", "why", *KINDS, "all"], rows)


def _kind(title: str) -> str:
    folder = title.split("/")[0]
    return next(kind for kind, folders in KINDS.items() if folder in folders)


def _class(group: dict[str, Any]) -> str:
    """The reason without what is one recipe's own."""
    if group["outcome"] == "measured":
        return ""
    reason = str(group["reason"])
    flag = re.search(
        r"cannot be used with (--[\w-]+) .*?: (.*?)(?:; nor with |\. Leave one)", reason
    )
    return (f"`{flag[1]}`: {flag[2]}" if flag else reason).replace("|", "\\|")


def endings(document: Document) -> str:
    """How the measurements ended."""
    ended = Counter(status for group in document["groups"] for status in group["statuses"])
    return ", ".join(f"{number} `{status}`" for status, number in ended.most_common())


def left_out(document: Document) -> str:
    """Flags that the small recipes do without, by why, with the number of their recipes."""
    flags: dict[str, Counter[str]] = {}
    for group in document["groups"]:
        for reasons in group["recipes"].values():
            for why, names in reasons.items():
                flags.setdefault(why, Counter()).update(names.split())
    rows = (
        [why, ", ".join(f"`{name}` {number}" for name, number in sorted(counted.items()))]
        for why, counted in sorted(flags.items())
    )
    return markdown(["why", "flags, each with its number of recipes"], rows)


def load(path: Path) -> Document:
    document: Document = json.loads(path.read_text())
    return document


def save(document: Document, path: Path) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def page(document: Document) -> str:
    """The part of the page that is made of one file."""
    name, commit = document["checkout"], document["checkout_commit"]
    ours = sorted({group["commit"] for group in document["groups"]})
    counted = counts(document)
    lines = [
        f"## {name}",
        f"**{', '.join(f'{outcome} {number}' for outcome, number in counted.items())}**: "
        f"{sum(counted.values())} recipes, for which {len(document['groups'])} were trained. "
        f"megatron-core {document['checkout_version']}{f' at {commit[:10]}' if commit else ''}, "
        f"torch {document['versions']['torch']}; ours at {', '.join(ours)}.",
        table(document),
        f"The measurements ended as {endings(document)}.",
        "Left out of the recipes:",
        left_out(document),
    ]
    return "\n\n".join(lines)
