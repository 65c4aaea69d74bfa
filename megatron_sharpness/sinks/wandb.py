"""Curves in Weights & Biases."""

from __future__ import annotations

from typing import Any

from megatron_sharpness.core.alarm import Alarm
from megatron_sharpness.core.measurement import Scalars


class WandbSink:
    """Logs every tag at the iteration's step.

    Args:
        run: a ``wandb`` run, or the module itself once a run has been started.
    """

    def __init__(self, run: Any) -> None:
        self.run = run

    def write(self, measurement: Scalars) -> None:
        self.run.log(measurement.scalars(), measurement.iteration)

    def alarm(self, alarm: Alarm) -> None:
        self.run.alert(title="Critical sharpness", text=str(alarm), level="WARN")
