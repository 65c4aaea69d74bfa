"""Megatron's ranks as forks of one process that has it imported: six seconds less for each."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.processes import ROOT, Rendezvous

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.megatron.imported"])


class Fork:
    """A rank: the part of ``subprocess.Popen`` that its users need."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        rank: int,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
    ) -> None:
        self.rendezvous = rendezvous
        variables = {**rendezvous.environment(rank), **environment}
        output = folder / f"output{rank}.txt"
        self.process: ForkServerProcess = CONTEXT.Process(
            target=_run, args=(list(arguments), variables, str(folder), str(output))
        )
        self.process.start()
        self.kill = self.process.kill

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return self.process.exitcode


def _run(arguments: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    """What ``python -m megatron_sharpness.megatron`` does once Megatron is imported."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(folder)

    import tests.megatron.imported  # noqa: F401
    from megatron_sharpness.megatron import cpu, install

    script, *rest = arguments
    sys.argv = [script, *cpu.add_required_flags(rest)]
    sys.path[:0] = [os.path.dirname(script), str(ROOT)]
    install()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves without
        sys.stdout.flush()
