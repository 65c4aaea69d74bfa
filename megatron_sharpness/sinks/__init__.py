"""Where records go. Every sink has one method, ``write(measurement)``."""

from megatron_sharpness.sinks.console import ConsoleSink
from megatron_sharpness.sinks.jsonl import JsonLinesSink
from megatron_sharpness.sinks.tensorboard import TensorBoardSink
from megatron_sharpness.sinks.wandb import WandbSink

__all__ = ["ConsoleSink", "JsonLinesSink", "TensorBoardSink", "WandbSink"]
