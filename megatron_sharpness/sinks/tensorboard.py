"""Curves in TensorBoard, by iteration and by samples."""

from __future__ import annotations

from typing import Any

from megatron_sharpness.core.alarm import Alarm
from megatron_sharpness.core.measurement import Scalars


class TensorBoardSink:
    """Writes every tag against iterations and, where samples are counted, as ``"<tag> vs samples"``
    too, as Megatron does.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter`` or what behaves like one.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, measurement: Scalars) -> None:
        for tag, value in measurement.scalars().items():
            self.writer.add_scalar(tag, value, measurement.iteration)
            if measurement.consumed_samples is not None:
                self.writer.add_scalar(f"{tag} vs samples", value, measurement.consumed_samples)

    def alarm(self, alarm: Alarm) -> None:
        self.writer.add_text("critical-sharpness-alarm", str(alarm), alarm.iteration)
