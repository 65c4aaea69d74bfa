"""``megatron-sharpness estimate``: what measuring would cost a Megatron run, before it is made."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from megatron_sharpness.core.errors import InputError, bad_flag
from megatron_sharpness.estimate.configuration import Run, parse_flags, plan, split
from megatron_sharpness.estimate.model import (
    HOST_BANDWIDTH,
    INTERVALS,
    MEMORY_BANDWIDTH,
    NETWORK_BANDWIDTH,
    PASSES,
    TFLOPS,
    Cost,
    cost,
    forward_seconds,
    iteration_seconds,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``megatron-sharpness estimate``."""
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="PATH",
        help="a file of Megatron's flags, as in configs/",
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="of the whole run")
    parser.add_argument(
        "--forward-seconds",
        type=float,
        metavar="S",
        help="seconds of a forward-only pass over the global batch (default: from --tflops)",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=TFLOPS,
        metavar="X",
        help="TFLOP/s that a GPU achieves in the forward pass (default: %(default)g)",
    )
    parser.add_argument(
        "--iteration-seconds",
        type=float,
        metavar="S",
        help="seconds of a training iteration (default: three forward passes, four under full "
        "recomputation)",
    )
    parser.add_argument(
        "--memory-bandwidth",
        type=float,
        default=MEMORY_BANDWIDTH,
        metavar="GB/S",
        help="read and written by a copy (default: %(default)g, an H100 SXM)",
    )
    parser.add_argument(
        "--network-bandwidth",
        type=float,
        default=NETWORK_BANDWIDTH,
        metavar="GB/S",
        help="that an all-gather brings a GPU (default: %(default)g, one 400 Gb/s adapter each)",
    )
    parser.add_argument(
        "--passes",
        type=float,
        default=PASSES,
        metavar="X",
        help="forward passes of a search in the mean (default: %(default)g, the certified search "
        "every 100 iterations)",
    )
    parser.add_argument(
        "--every",
        type=int,
        nargs="+",
        default=INTERVALS,
        metavar="N",
        help=f"intervals of measurements (default: {' '.join(map(str, INTERVALS))})",
    )
    parser.add_argument(
        "--critical-sharpness-offload",
        choices=["none", "cpu"],
        help="where the copies lie (default: as in the configuration, or none)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the estimate."""
    for name, value in vars(arguments).items():
        for number in value if name == "every" else [value]:
            if isinstance(number, int | float) and not 0 < number < math.inf:
                raise bad_flag(name, number, "must be positive and finite; give such a number")
    flags = _read(arguments.config)
    if arguments.critical_sharpness_offload:
        flags.critical_sharpness_offload = arguments.critical_sharpness_offload
    planned = plan(flags, arguments.gpus)
    forward = arguments.forward_seconds or forward_seconds(planned, arguments.tflops)
    estimate = cost(
        planned,
        forward,
        memory_bandwidth=arguments.memory_bandwidth * 1e9,
        network_bandwidth=arguments.network_bandwidth * 1e9,
        passes=arguments.passes,
    )
    iteration = arguments.iteration_seconds or iteration_seconds(planned, forward)
    print(f"{arguments.config} on {arguments.gpus} GPUs\n")
    for name, text in _rows(planned, estimate, iteration, arguments.every):
        print(f"  {name:<22}{text}")
    print("\nAssumed: " + ";\n         ".join(_assumptions(arguments, flags, planned)) + ".")


def _read(path: Path) -> argparse.Namespace:
    try:
        words = split(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise bad_flag(
            "config", path, f"cannot be read ({reason}); name a file of Megatron's flags"
        ) from error
    try:
        return parse_flags(words)
    except InputError as error:
        raise InputError(f"--config {path}: {error}") from None


def _rows(
    planned: Run, estimate: Cost, iteration: float, intervals: Sequence[int]
) -> list[tuple[str, str]]:
    place = "in host memory, for each GPU" if planned.offloads else "on each GPU"
    return [
        ("layout", f"tensor {planned.tensor} × pipeline {planned.stages} × context "
                   f"{planned.context} × data {planned.data}, {planned.micro_batches} "
                   "micro-batches"),
        ("parameters", f"{planned.parameters / 1e9:.3f} billion"),
        ("of them a GPU holds", f"{planned.share / 1e6:,.1f} million, and steps "
                                f"{planned.owned / 1e6:,.1f} million"),
        ("forward pass", f"{estimate.forward:.3f} s"),
        ("training iteration", f"{iteration:.3f} s"),
        ("probe", f"{estimate.probe:.3f} s = {estimate.probe / estimate.forward:.3f} × the forward "
                  f"pass (write {1e3 * estimate.write:.1f} ms, gather "
                  f"{1e3 * estimate.gather:.1f} ms)"),
        ("measurement", f"{estimate.measurement:.3f} s = {estimate.passes:g} probes, snapshot "
                        f"{1e3 * estimate.snapshot:.1f} ms, products "
                        f"{1e3 * estimate.products:.1f} ms, restore "
                        f"{1e3 * estimate.restore:.1f} ms"),
        *((f"overhead, every {every}", f"{estimate.overhead(every, iteration):.2%}")
          for every in intervals),
        ("extra memory", f"{planned.memory / 2**20:,.0f} MiB {place}, during a measurement"),
    ]  # fmt: skip


def _assumptions(
    arguments: argparse.Namespace, flags: argparse.Namespace, planned: Run
) -> list[str]:
    lines = [
        f"a vocabulary of {flags.vocab_size} before padding",
        f"{arguments.memory_bandwidth:g} GB/s of memory, {arguments.network_bandwidth:g} GB/s into "
        "a GPU in an all-gather",
        f"{arguments.passes:g} passes a search; a run's first measurement makes one or two more",
    ]
    if arguments.forward_seconds is None:
        lines.append(f"the forward pass at {arguments.tflops:g} TFLOP/s a GPU")
    if arguments.iteration_seconds is None:
        lines.append(f"an iteration of {iteration_seconds(planned, 1.0):g} forward passes")
    if planned.overlaps:
        lines.append("gathers hidden behind the first micro-batch of each stage")
    if planned.offloads:
        lines.append(f"{HOST_BANDWIDTH / 1e9:g} GB/s between a GPU and its host")
    return lines
