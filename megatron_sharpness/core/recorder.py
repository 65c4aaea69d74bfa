"""What a rank of a trial writes down.

Each writes a file of JSON lines: what it runs on, and then, an iteration a line, fingerprints of
all that training reads later, as far as they have changed. Where there is a measurement, it is
confirmed by further evaluations.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sharpness.core.errors import InputError, reason_of
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.memory import device_peak, host_peak
from megatron_sharpness.core.replay import RandomStates
from megatron_sharpness.core.search import find_critical_lr
from megatron_sharpness.core.state import State
from megatron_sharpness.core.step import LossAt, Step
from megatron_sharpness.core.trial import Trial
from megatron_sharpness.core.watch import CHUNK, Checksums, fetched

#: Packages whose versions are written down.
PACKAGES = (
    "megatron-sharpness", "torch", "megatron-core", "megatron-bridge", "megatron-fsdp",
    "transformer-engine", "flash-attn", "triton", "numpy",
)  # fmt: skip

#: Learning rates of a step at which the loss is another one than at its own.
FAR = 1000.0

#: A part of a name that each process draws for itself: a UUID.
_OF_A_PROCESS = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Recorder:
    """Writes down what a rank of a trial is.

    Args:
        trial: what is asked for.
        rank: of this process.
        ranks: how many there are.
        layout: what says how the model lies on them, by name.

    Raises:
        InputError: another training of the trial has written there.
    """

    def __init__(
        self, trial: Trial, *, rank: int, ranks: int, layout: Mapping[str, object]
    ) -> None:
        trial.folder.mkdir(parents=True, exist_ok=True)
        path = trial.folder / f"rank-{rank}.jsonl"
        try:
            self._file = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise InputError(
                f"{path}: it is there already; what is verified must train once, and not be "
                "started again by itself"
            ) from None
        self._before: dict[str, list[Any]] = {}
        self._passes: list[float] = []
        self._tokens: list[float] = []
        self._confirming = 0.0
        self._since: float | None = None
        self._sketches = Sketches()
        device = torch.cuda.get_device_name() if torch.accelerator.is_available() else "CPU"
        self._write(
            rank=rank, ranks=ranks, host=platform.node(), process=os.getpid(), device=device,
            processor=platform.processor() or platform.machine(), versions=_versions(),
            layout={name: value for name, value in layout.items() if value not in (None, False)},
        )  # fmt: skip

    def begin(self) -> None:
        """An iteration begins."""
        self._since = clock()

    def timed(
        self,
        function: Callable[[], Any],
        tokens: Callable[[Any], Sequence[float]] = lambda result: (),
    ) -> Callable[[], Any]:
        """A forward-only pass that says how long it takes.

        Args:
            function: the pass.
            tokens: of each loss that it returns, where these are averaged one by one.
        """

        @functools.wraps(function)
        def timed_function() -> Any:
            started = clock()
            result = function()
            self._passes.append(clock() - started)
            self._tokens = list(tokens(result))
            return result

        return timed_function

    def confirm(self, step: Step, record: Measurement, loss_at: LossAt) -> None:
        """Evaluate again what a measurement says, and search as the paper does. Collective.

        That is L(θ), the two ends of the bracket and η_c in it, and Algorithms 1 and 2; where there
        is no η_c, L at the step's own rate and far out.
        """
        started = clock()
        seconds: list[float] = []
        self._passes = []

        def evaluate(eta: float) -> float:
            began = clock()
            loss = loss_at(eta)[0]
            seconds.append(clock() - began)
            return loss

        found: dict[str, Any] = {
            "measured": json.loads(record.to_json()), "trained": step.training_loss,
            "replayed": None, "losses": [], "apart": [], "bisection": None, "error": None,
        }  # fmt: skip
        try:
            found["replayed"] = evaluate(0.0)
            if record.status == "found":
                rates = (record.critical_lr_lower, record.critical_lr, record.critical_lr_upper)
                found["losses"] = [evaluate(rate) for rate in rates if rate is not None]
                search = find_critical_lr(
                    evaluate, loss=found["replayed"], guess=step.lr, method="bisection"
                )
                found["bisection"] = {
                    "critical_lr": search.eta, "status": search.status,
                    "non_monotone": search.non_monotone, "evaluations": search.evaluations,
                }  # fmt: skip
            else:
                found["apart"] = [evaluate(step.lr), evaluate(FAR * step.lr)]
        except Exception as error:
            found["error"] = reason_of(error)
        self._write(
            confirmed=step.iteration, **found, tokens=self._tokens,
            passes=self._passes[-len(seconds) :], probes=seconds,
        )  # fmt: skip
        self._confirming += clock() - started

    def iteration(
        self,
        number: int,
        roots: Mapping[str, object],
        random: RandomStates,
        *,
        left_out: Callable[[Tensor], bool] = lambda tensor: False,
        **options: Any,
    ) -> None:
        """One is over, or, where none was begun, the first one is to come.

        Args:
            number: of the iteration.
            roots: what training reads later, by name.
            random: the random states.
            left_out: whether a tensor is not to be compared.
            options: of :class:`~megatron_sharpness.core.state.State`.
        """
        seconds = 0.0 if self._since is None else clock() - self._since - self._confirming
        state = State(roots, parameters=True, copied=lambda tensor: False, **options)
        kept = {name: t for name, t in state.tensors.items() if not left_out(t)}
        now: dict[str, list[Any]] = {
            f"random states of {name}": [identity(v)] for name, v in random.values().items()
        }
        now |= {_OF_A_PROCESS.sub("*", name): [identity(v)] for name, v in state.plain.items()}
        sums = Checksums(kept.values()).values()
        sketches = fetched([self._sketches.of(t) for t in kept.values()])
        for (name, tensor), checksum, sketch in zip(kept.items(), sums, sketches, strict=True):
            kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            now[name] = [f"{kind} {checksum & (2**64 - 1):016x}", *sketch]
        before, self._before = self._before, now
        changed = {name: value for name, value in now.items() if before.get(name) != value}
        self._write(
            iteration=number, seconds=seconds, changed=changed,
            gone=[name for name in before if name not in now],
            device_memory=device_peak(), host_memory=host_peak(),
        )  # fmt: skip
        self._confirming = 0.0

    def _write(self, **entries: Any) -> None:
        self._file.write(json.dumps(entries, default=str) + "\n")
        self._file.flush()


class Sketches:
    """Two numbers of a tensor w, from which two that differ can be told how far they are apart.

    ⟨w, z⟩ with z of standard normal numbers, the same for each 2²⁰ elements, and ‖w‖: the first
    ones of w and v differ by ‖w − v‖ in the root mean square over z.
    """

    def __init__(self) -> None:
        normal = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0))
        self._normal = {torch.device("cpu"): normal}

    @torch.no_grad()
    def of(self, tensor: Tensor) -> Tensor:
        """[2], fp64, not waited for; zeros of a tensor that holds no floating-point numbers."""
        sums = torch.zeros(2, dtype=torch.float64, device=tensor.device)
        if not tensor.is_floating_point():
            return sums
        normal = self._normal.setdefault(
            tensor.device, self._normal[torch.device("cpu")].to(tensor.device)
        )
        for part in torch.split(tensor.detach().reshape(-1), CHUNK):
            values = part.float()
            sums += torch.stack((values @ normal[: len(values)], values @ values)).double()
        sums[1].sqrt_()
        return sums


def identity(value: Any) -> str:
    """The same for values that are the same bits."""
    text = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else ""
    if 0 < len(text) <= 40:
        return text
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()[:16]


def clock() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _add(digest: Any, value: Any) -> None:
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(value.tobytes())
    elif isinstance(value, (bytes, bytearray)):
        digest.update(value)
    elif isinstance(value, Mapping):
        for key, held in value.items():
            _add(digest, key)
            _add(digest, held)
    elif isinstance(value, (list, tuple)):
        for held in value:
            _add(digest, held)
    else:
        digest.update(repr(value).encode())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda and torch.accelerator.is_available():
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found
