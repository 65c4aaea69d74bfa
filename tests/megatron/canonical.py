"""The same weights under every parallel layout, and the batch written down for a reference.

``OBSERVED_FAULT=canonical`` in a run: every parameter is drawn from a generator seeded with its
global name, in full, and cut to this rank's part. The micro-batches of the first step are saved.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch


def full_parameter(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The global parameter of that name: norms around one, biases around zero, weights small."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float32)
    if "norm" in name and name.endswith("weight"):
        return 1.0 + 0.1 * values
    return (0.05 if name.endswith("bias") else 0.15) * values


def global_name(name: str, first_layer: int, first_expert: int) -> str:
    name = name.replace("module.", "")
    name = re.sub(r"(decoder.layers)\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) + first_layer}", name)
    name = re.sub(r"local_experts\.(\d+)", lambda m: f"experts.{int(m[1]) + first_expert}", name)
    # With tied embeddings the last stage holds a copy under the output layer's name.
    return name.replace("output_layer.weight", "embedding.word_embeddings.weight")


def write_weights(model: Any, optimizer: Any) -> None:
    """The canonical weights into a model as Megatron has built it, and into its optimizer."""
    from megatron.core import mpu

    for chunk in model:
        core = chunk.module
        while hasattr(core, "module"):
            core = core.module
        layers = core.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in core.named_parameters():
            experts = sum(1 for n, _ in core.named_parameters()
                          if "local_experts" in n and "linear_fc1.weight" in n
                          and "layers.0." in n)
            first_expert = mpu.get_expert_model_parallel_rank() * experts
            dim = getattr(parameter, "partition_dim", -1)
            shape, ranks, rank = list(parameter.shape), 1, 0
            if getattr(parameter, "tensor_model_parallel", False) and dim >= 0:
                ranks = mpu.get_tensor_model_parallel_world_size()
                rank = mpu.get_tensor_model_parallel_rank()
                shape[dim] *= ranks
            full = full_parameter(
                global_name(name, first_layer, first_expert), tuple(shape)
            )
            part = full.chunk(ranks, dim=dim)[rank] if ranks > 1 else full
            with torch.no_grad():
                parameter.copy_(part)
    optimizer.reload_model_params()


def keep_batches() -> None:
    """Write the first recorded step's micro-batches down."""
    from megatron_sharpness.megatron import replay

    real_call = replay.RecordingSchedule.__call__

    def recorded(self: Any, **kwargs: Any) -> Any:
        result = real_call(self, **kwargs)
        path = Path(os.environ["OBSERVED_OUT"]) / "batches.pt"
        if not path.exists() and isinstance(self._batches, replay._Tee):
            torch.save(self._batches.seen, path)
        return result

    replay.RecordingSchedule.__call__ = recorded


def install() -> None:
    from megatron.training import training

    real_setup = training.setup_model_and_optimizer

    def setup(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = real_setup(*args, **kwargs)
        write_weights(model, optimizer)
        return model, optimizer, scheduler

    training.setup_model_and_optimizer = setup
    keep_batches()
