"""Curves through DeepSpeed's monitor: TensorBoard, W&B, Comet, CSV, as its configuration says."""

from __future__ import annotations

from typing import Any

from megatron_sharpness.core.measurement import Scalars


class DeepSpeedSink:
    """Writes every tag as ``Train/Samples/<tag>`` against the samples trained on, as the engine
    writes its own.

    Args:
        engine: that ``deepspeed.initialize`` has made.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def write(self, measurement: Scalars) -> None:
        samples, scalars = self.engine.global_samples, measurement.scalars()
        self.engine.monitor.write_events(
            [(f"Train/Samples/{tag}", value, samples) for tag, value in scalars.items()]
        )
