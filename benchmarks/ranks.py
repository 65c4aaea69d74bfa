"""Processes of this machine that time something together, and their clock."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.results import ROOT
from tests.processes import Rendezvous

#: What names the file that rank 0 of a worker writes its results to.
OUT = "BENCHMARK_OUT"

#: A script under Megatron, on GPUs where there are any.
MEGATRON = ("-m", "megatron_sharpness.megatron")


def torchrun(processes: int, *options: str) -> list[str]:
    """The words that start a script or a module, which follow them, as ranks of this machine."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), *options),
    ]


def launch(
    command: Sequence[str], processes: int = 1, environment: Mapping[str, str] | None = None
) -> Any:
    """Run ``python *command`` as ranks 0… and return what rank 0 wrote with :func:`write`.

    Where there is not a GPU for each of them, they see none.

    Raises:
        RuntimeError: a rank failed; the message ends with its output.
    """
    # What Megatron insists on.
    connections = "8" if {"--use-megatron-fsdp", "--use-torch-fsdp2"} & set(command) else "1"
    rendezvous = Rendezvous(processes)
    hidden = {} if torch.cuda.device_count() >= processes else {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        ranks = []
        for rank in range(processes):
            variables = {
                **rendezvous.environment(rank),
                "CUDA_DEVICE_MAX_CONNECTIONS": connections, "PYTHONPATH": str(ROOT), OUT: str(out),
            }  # fmt: skip
            with Path(folder, f"{rank}.txt").open("wb") as output:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *command], cwd=ROOT, stdout=output,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **variables, **hidden, **(environment or {})},
                    )
                )  # fmt: skip
        try:
            while any(process.poll() is None for process in ranks):
                if any(process.poll() for process in ranks):
                    break
                time.sleep(0.1)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if any(process.returncode for process in ranks):
            outputs = [Path(folder, f"{rank}.txt").read_text()[-3000:] for rank in range(processes)]
            raise RuntimeError(f"{' '.join(command)} failed:\n" + "\n".join(outputs))
        return json.loads(out.read_text())


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """A function that adds to ``seconds`` how long each of its calls takes."""

    @functools.wraps(function)
    def timed_function(*args: Any, **kwargs: Any) -> Any:
        result = None

        def call() -> None:
            nonlocal result
            result = function(*args, **kwargs)

        seconds.append(clock(call))
        return result

    return timed_function


def write(result: Any) -> None:
    """What :func:`launch` returns, from rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(os.environ[OUT]).write_text(json.dumps(result))


def alternate(
    functions: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each function, taken in turns; all ranks start and end each together.

    The first turn is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions + 1):
        for name, function in functions.items():
            seconds[name].append(clock(function))
    return {name: values[1:] for name, values in seconds.items()}


def clock(function: Callable[[], object]) -> float:
    """Seconds until ``function`` is over on all ranks and devices."""
    _meet()
    start = time.perf_counter()
    function()
    _meet()
    return time.perf_counter() - start


def copy_bandwidth(size: int, device: torch.device) -> float:
    """Bytes read and written a second by a copy of ``size`` bytes in all."""
    source = torch.zeros(size // 8, device=device)
    target = torch.ones_like(source)
    seconds = alternate({"copy": lambda: target.copy_(source)}, 5)["copy"]
    return 2 * source.nbytes / sorted(seconds)[2]


def _meet() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
