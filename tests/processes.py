"""The ranks of a run as processes of this machine, started as torchrun would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]


class Rendezvous:
    """Where the ranks of a run meet: a store that this process serves, as torchrun's agent does.

    So its port is taken from the moment that it is known; one that is found free and bound later
    may be another's by then. It is there as long as this object, and for one process group.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.port = str(self._store.port)

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun would add to the environment of a rank."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.processes),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }


class Rank(subprocess.Popen[bytes]):
    """A process of a run, which keeps the place where its ranks meet."""

    def __init__(self, rendezvous: Rendezvous, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rendezvous = rendezvous


def start_ranks(
    arguments: Sequence[str],
    folder: Path,
    processes: int,
    *,
    environment: Mapping[str, str] | None = None,
    pythonpath: Sequence[str] = (),
) -> list[Rank]:
    """``python *arguments`` in ``folder`` as ranks 0…; each writes ``output<rank>.txt`` there."""
    folder.mkdir(parents=True, exist_ok=True)
    search = {"PYTHONPATH": os.pathsep.join([str(ROOT), *pythonpath])}
    rendezvous, started = Rendezvous(processes), []
    for rank in range(processes):
        variables = rendezvous.environment(rank)
        with (folder / f"output{rank}.txt").open("wb") as output:
            started.append(
                Rank(
                    rendezvous, [sys.executable, *arguments],
                    env={**os.environ, **variables, **search, **(environment or {})},
                    stdout=output, stderr=subprocess.STDOUT, cwd=folder,
                )
            )  # fmt: skip
    return started
