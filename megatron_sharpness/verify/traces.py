"""What the ranks of a trial have written down."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sharpness.core.errors import InputError

#: A line of a training log, and its number.
_LINE = re.compile(r"(?:iteration|step) +(\d+) */", re.IGNORECASE)

#: Ranks of a run whose traces are kept.
KEPT = 8

#: What a value is, by its name: bits, and of a tensor ⟨w, z⟩ and ‖w‖, too.
Prints = dict[str, list[Any]]


@dataclass
class RankTrace:
    """One rank's.

    Attributes:
        facts: what it runs on, and how the model lies on the ranks.
        prints: what it is before the first iteration and after each, by number.
        seconds: of each iteration, with its measurement, by number.
        confirmed: the measurements, with what was evaluated again.
        device_memory, host_memory: largest so far, in bytes, by number.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    prints: dict[int, Prints] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    confirmed: list[dict[str, Any]] = field(default_factory=list)
    device_memory: dict[int, int | None] = field(default_factory=dict)
    host_memory: dict[int, int] = field(default_factory=dict)

    @property
    def made(self) -> list[int]:
        """Numbers of the iterations."""
        return list(self.prints)[1:]


class Trace:
    """One run's.

    Args:
        folder: where its ranks have written.
        ranks: how many they were.

    Attributes:
        rank: what a rank has written, as far as it is whole lines, by its number. Some are kept:
            all of a large run would be more than memory holds.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.ranks = ranks
        self.rank: Callable[[int], RankTrace] = functools.lru_cache(KEPT)(self._read)

    @classmethod
    def of(cls, folder: Path) -> Trace:
        """
        Raises:
            InputError: not all ranks have written there.
        """
        found = {int(path.stem.removeprefix("rank-")) for path in folder.glob("rank-*.jsonl")}
        if not found:
            raise InputError(f"{folder}: no rank has written there")
        ranks = int(cls(folder, 1).rank(min(found)).facts["ranks"])
        if missing := sorted(set(range(ranks)) - found):
            raise InputError(
                f"{folder}: rank {missing[0]} has not written there, and {len(found)} of {ranks} "
                "have; --out must be a folder that all nodes see"
            )
        return cls(folder, ranks)

    def _read(self, number: int) -> RankTrace:
        trace, now = RankTrace(), Prints()
        for line in _lines(self.folder / f"rank-{number}.jsonl"):
            if "iteration" in line:
                i = int(line["iteration"])
                now = {**now, **line["changed"]}
                for name in line["gone"]:
                    now.pop(name, None)
                trace.prints[i] = now
                trace.seconds[i] = line["seconds"]
                trace.device_memory[i] = line["device_memory"]
                trace.host_memory[i] = line["host_memory"]
            elif "confirmed" in line:
                trace.confirmed.append(line)
            else:
                trace.facts = line
        return trace

    @property
    def records(self) -> list[dict[str, Any]]:
        """The measurements as they went to the log, of the steps' own batches."""
        path = self.folder / "critical_sharpness.jsonl"
        lines = _lines(path) if path.exists() else iter(())
        return [line for line in lines if line["batch"] == "train" and not line["part"]]

    @property
    def log(self) -> dict[int, dict[str, str]]:
        """The lines of the training log by iteration: what they say, by name."""
        path = self.folder / "log.txt"
        found: dict[int, dict[str, str]] = {}
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            if (match := _LINE.search(line)) is None or "|" not in line:
                continue
            parts = (part.rpartition(":") for part in line[match.start() :].split("|")[1:])
            said = {name.strip(): value.strip() for name, _, value in parts if name.strip()}
            found.setdefault(int(match[1]), {}).update(said)
        return found


def iterations_done(folder: Path, rank: int = 0) -> int:
    """How many iterations a rank has written down so far."""
    path = folder / f"rank-{rank}.jsonl"
    if not path.exists():
        return 0
    return max(0, path.read_bytes().count(b'\n{"iteration": ') - 1)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
