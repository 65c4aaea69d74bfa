"""The ranks of a run as processes of this machine, started as torchrun would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(processes: int) -> list[dict[str, str]]:
    """What torchrun would add to the environment of each rank."""
    port = str(free_port())
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        for rank in range(processes)
    ]


def start_ranks(
    arguments: Sequence[str],
    folder: Path,
    processes: int,
    *,
    environment: Mapping[str, str] | None = None,
    pythonpath: Sequence[str] = (),
) -> list[subprocess.Popen[bytes]]:
    """``python *arguments`` in ``folder`` as ranks 0…; each writes ``output<rank>.txt`` there."""
    folder.mkdir(parents=True, exist_ok=True)
    search = {"PYTHONPATH": os.pathsep.join([str(ROOT), *pythonpath])}
    started = []
    for rank, variables in enumerate(rank_environment(processes)):
        with (folder / f"output{rank}.txt").open("wb") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env={**os.environ, **variables, **search, **(environment or {})},
                    stdout=output, stderr=subprocess.STDOUT, cwd=folder,
                )
            )  # fmt: skip
    return started
