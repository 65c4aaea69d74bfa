"""One line a measurement in the training log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_sharpness.core.measurement import TRAIN, Measurement


class ConsoleSink:
    """Prints a line in the style of Megatron's training log.

    Args:
        print_line: what prints, e.g. ``print``.
    """

    def __init__(self, print_line: Callable[[str], Any] = print) -> None:
        self.print_line = print_line

    def write(self, measurement: Measurement) -> None:
        self.print_line(format_line(measurement))


def format_line(measurement: Measurement) -> str:
    """`` critical sharpness at iteration 100 | status: found | …``, `` of NAME`` where it is."""
    of = "" if measurement.name == TRAIN else f" of {measurement.name.replace('/', ' ')}"
    parts = [
        f" critical sharpness{of} at iteration {measurement.iteration:8d}",
        f"status: {measurement.status}",
    ]
    if measurement.reason:
        parts.append(measurement.reason)
    for name, value in (
        ("critical sharpness", measurement.critical_sharpness),
        ("critical learning rate", measurement.critical_lr),
        ("relative error of both", measurement.critical_lr_error),
        ("learning rate over critical", measurement.lr_over_critical),
        ("directional sharpness", measurement.directional_sharpness),
    ):
        if value is not None:
            parts.append(f"{name}: {value:.6E}")
    parts.append(f"evaluations: {measurement.evaluations}")
    parts.append(f"seconds: {measurement.seconds:.3f}")
    return " | ".join(parts) + " |"
