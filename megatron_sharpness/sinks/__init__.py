"""Where records go. Every sink has one method, ``write(measurement)``."""

from __future__ import annotations

from typing import Any

from megatron_sharpness.sinks.console import ConsoleSink
from megatron_sharpness.sinks.deepspeed import DeepSpeedSink
from megatron_sharpness.sinks.jsonl import JsonLinesSink
from megatron_sharpness.sinks.tensorboard import TensorBoardSink
from megatron_sharpness.sinks.wandb import WandbSink

__all__ = [
    "ConsoleSink", "DeepSpeedSink", "JsonLinesSink", "TensorBoardSink", "WandbSink", "curve_sinks"
]  # fmt: skip


def curve_sinks(writer: Any, run: Any = None) -> list[TensorBoardSink | WandbSink]:
    """Sinks of a process's loggers of curves.

    Args:
        writer: TensorBoard's, or None where there is none.
        run: of Weights & Biases, or None.
    """
    return [
        *([] if writer is None else [TensorBoardSink(writer)]),
        *([] if run is None else [WandbSink(run)]),
    ]
