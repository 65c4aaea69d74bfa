"""The committed results of the benchmarks: one JSON file each, and the table that is made of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")


def machine() -> dict[str, Any]:
    """Where and with what a benchmark runs: hardware, versions and commit."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("megatron-core", "transformer-engine", "flash-attn", "hessian-eigenthings"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{os.cpu_count()} CPU cores ({_processor()}), {', '.join(gpus) or 'no GPU'}",
        "versions": versions,
        "commit": _commit(),
    }


def save(name: str, document: dict[str, Any]) -> Path:
    """Write what a benchmark returned, and where it ran, to ``results/NAME.json``."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**machine(), **document}, indent=1, allow_nan=False) + "\n")
    return path


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def spread(values: Iterable[float]) -> list[float]:
    """Minimum, median and maximum, to four digits."""
    values = list(values)
    return [
        float(f"{value:.4g}") for value in (min(values), statistics.median(values), max(values))
    ]


def between(values: Sequence[float], form: str = ".2f") -> str:
    """A spread as a cell: ``median (minimum–maximum)``."""
    low, middle, high = (format(value, form) for value in values)
    return f"{middle} ({low}–{high})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1] for line in text.splitlines() if line.startswith("model name")]
    return " ".join(names[0].split()) if names else platform.machine()


def _commit() -> str | None:
    """What is checked out, with a mark where it was changed beside the results themselves."""
    others = (".", f":(exclude){RESULTS.relative_to(ROOT)}")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *others)
    commit = _git("describe", "--always", "--exclude", "*")
    return f"{commit}-dirty" if commit and changed else commit


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
