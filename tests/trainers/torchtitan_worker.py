"""Trains a tiny Llama with torchtitan, without and with measurement, and writes what it saw.

Started by ``test_torchtitan.py``, one process a rank:
``python -m tests.trainers.torchtitan_worker FOLDER``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from . import torchtitan_cpu  # noqa: F401  isort: skip

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import CompileConfig, DebugConfig
from torchtitan.models import qwen3
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.common.rope import CosSinRoPE
from torchtitan.models.llama3 import model_registry
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.trainers.torchtitan import (
    CriticalSharpnessConfig,
    CriticalSharpnessTrainer,
)
from tests.digest import hash_of, random_states
from tests.trainers.harness import lines_of

VOCABULARY, LENGTH, STEPS = 2048, 16, 6


class Tokenizer(BaseTokenizer):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()

    def encode(self, text: str, *args: Any, **kwargs: Any) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int], *args: Any, **kwargs: Any) -> str:
        return bytes(tokens).decode(errors="replace")

    def get_vocab_size(self) -> int:
        return VOCABULARY


class Data(BaseDataLoader):
    """Sequences in which a token predicts the next; every one with another number of labels."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any
    ) -> None:
        self.ranks, self.rank, self.size = dp_world_size, dp_rank, local_batch_size
        self.batches = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(self.batches * self.ranks + self.rank)
            self.batches += 1
            start = torch.randint(VOCABULARY, (self.size, 1), generator=generator)
            text = (start + 3 * torch.arange(LENGTH + 1)) % 61
            labels = text[:, 1:].clone()
            labels[:, : 1 + self.batches % 3 + 2 * self.rank] = -100
            positions = torch.arange(LENGTH).expand(self.size, -1)
            yield {"input": text[:, :-1], "positions": positions}, labels

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


def model_spec(dropout: float, layers: int, experts: bool) -> Any:
    spec = qwen3.model_registry("debugmodel_moe") if experts else model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:layers]
    if experts:
        spec.model.layers = qwen3._build_qwen3_moe_layers(
            fuse_qkv=True, n_layers=layers, dim=256, n_heads=4, n_kv_heads=2, head_dim=64,
            moe_hidden_dim=32, num_experts=4, top_k=2, attn_backend="flex",
            rope=CosSinRoPE.Config(dim=64, max_seq_len=4096, theta=1e6),
            moe_comm_backend="standard",
        )  # fmt: skip
    for _, _, parent, name in list(spec.model.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())  # flex has no backward here
    parallelize = spec.parallelize_fn

    def parallelize_with_dropout(model: nn.Module, **kwargs: Any) -> nn.Module:
        """torchtitan's models have none, and a replay without it would be easy."""
        model = parallelize(model, **kwargs)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo scales no sums
        for layer in model.layers.values():
            layer.register_forward_hook(
                lambda module, _, output: F.dropout(output, dropout, module.training)
            )
        return model

    spec.parallelize_fn = parallelize_with_dropout
    return spec


def configure(
    folder: Path,
    *,
    every: int,
    chunked: bool = False,
    dropout: float = 0.1,
    layers: int = 2,
    experts: bool = False,
    **sections: Any,
) -> Any:
    loss = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)
    kind = CriticalSharpnessTrainer.Config if every >= 0 else Trainer.Config
    config = kind(
        model_spec=model_spec(dropout, layers, experts),
        loss=ChunkedLossWrapper.Config(num_chunks=4, loss_fn=loss) if chunked else loss,
        dump_folder=str(folder),
        tokenizer=Tokenizer.Config(),
        dataloader=Data.Config(),
        optimizer=default_adamw(lr=3e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=2,
            global_batch_size=8,
            seq_len=LENGTH,
            max_norm=0.5,
            steps=STEPS,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        metrics=MetricsProcessor.Config(log_freq=3, enable_tensorboard=True),
        activation_checkpoint=None,
        debug=DebugConfig(seed=3),
    )
    if every > 0:
        config.critical_sharpness = CriticalSharpnessConfig(every=every)
    for name, value in sections.items():
        setattr(config, name, value)
    return config


class Witness:
    """Keeps what it takes to evaluate each step's loss anew, without the package."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.steps = trainer, {}
        self.states: dict[str, list[Tensor]] = {}
        for part in trainer.model_parts:
            for name, layer in part.layers.items():
                layer.register_forward_pre_hook(functools.partial(self.forward, name))
        optimizers = trainer.optimizers.optimizers
        optimizers[0].register_step_pre_hook(self.before)
        optimizers[-1].register_step_post_hook(self.after)

    def forward(self, layer: str, *_: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            if not self.states:
                parts = self.trainer.model_parts
                self.buffers = {n: b.clone() for p in parts for n, b in p.named_buffers()}
            self.states.setdefault(layer, []).append(torch.get_rng_state())

    def before(self, optimizer: Any, *_: Any) -> None:
        if self.states:  # not the step that makes the optimizer's state for a checkpoint
            self.steps[self.trainer.step] = {
                "before": whole(self.trainer.model_parts),
                "lr": optimizer.param_groups[0]["lr"],
                "random": self.states,
                "buffers": self.buffers,
            }
            self.states = {}

    def after(self, *_: Any) -> None:
        if self.trainer.step in self.steps:
            self.steps[self.trainer.step]["after"] = whole(self.trainer.model_parts)


def whole(parts: list[nn.Module]) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for part in parts
        for name, p in part.named_parameters()
    }


def of_all_stages(step: dict[str, Any]) -> dict[str, Any]:
    """A step as all stages of a pipeline have seen it."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, step)
    parts = ("before", "after", "random", "buffers")
    return step | {part: {k: v for rank in ranks for k, v in rank[part].items()} for part in parts}


def losses_anew(
    trainer: Any, step: dict[str, Any], record: dict[str, Any], dropout: float
) -> dict[str, float]:
    """L(θ), L(lower), L(upper) and ⟨g, Δθ⟩, from the definitions."""
    torch.set_default_dtype(torch.float32)
    step = of_all_stages(step) if trainer.parallel_dims.pp_enabled else step
    model = trainer.model_config.build().train()
    model.load_state_dict(step["before"], strict=False)
    model.init_states(buffer_device=torch.device("cpu"))
    for name, buffer in model.named_buffers():
        buffer.copy_(step["buffers"][name])
    passes = 0
    for name, layer in model.layers.items():
        states = step["random"][name]
        layer.register_forward_pre_hook(
            lambda *_, states=states: torch.set_rng_state(states[passes])
        )
        layer.register_forward_hook(lambda _, __, output: F.dropout(output, dropout))
    update = {
        name: (start - step["after"][name]) / step["lr"] for name, start in step["before"].items()
    }
    data = trainer.dataloader
    again = Data(
        Data.Config(), dp_world_size=data.ranks, dp_rank=data.rank, local_batch_size=data.size
    )
    count = len(step["random"]["0"])
    again.batches = (record["iteration"] - 1) * count
    iterator = iter(again)
    batches = [next(iterator) for _ in range(count)]
    tokens = reduced(float(sum(int(labels.ne(-100).sum()) for _, labels in batches)), data.ranks)

    def loss(eta: float, backward: bool = False) -> float:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(step["before"][name] - eta * update[name])
        nonlocal passes
        total = 0.0
        for passes, (inputs, labels) in enumerate(batches):  # noqa: B007
            logits = model(inputs["input"], positions=inputs["positions"]).float()
            part = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            if backward:
                part.backward()
            total += part.item()
        return reduced(total, data.ranks) / tokens

    saved = torch.get_rng_state()
    anew = {"loss": loss(0.0, backward=True), "tokens": tokens}
    slope = sum(float((p.grad * update[name]).sum()) for name, p in model.named_parameters())
    anew["slope"] = reduced(slope, data.ranks) / tokens
    for end in ("lower", "upper"):
        anew[end] = loss(record[f"critical_lr_{end}"])
    torch.set_rng_state(saved)
    return anew


def reduced(value: float, ranks: int) -> float:
    """The sum over data-parallel ranks; all others compute the same here."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() * ranks / dist.get_world_size()


def digest(trainer: Any) -> dict[str, str]:
    """Hashes of what training ends with, on this rank."""
    parts, optimizers = trainer.model_parts, trainer.optimizers.optimizers
    return {
        "parameters": hash_of(p for part in parts for p in part.parameters()),
        "buffers": hash_of(b for part in parts for b in part.buffers()),
        "optimizer": hash_of(
            v for entry in optimizers for state in entry.state.values() for v in state.values()
        ),
        "random": random_states(),
        "trainer": str(trainer.state_dict()),
    }


def run(folder: Path, name: str, *, witness: bool = False, **options: Any) -> dict[str, Any]:
    random.seed(1)
    np.random.seed(1)
    # In it are meshes of the run before, which equal this one's, and are not the same objects.
    _clear_sharding_prop_cache()
    config = configure(folder / name, **options)
    trainer = config.build()
    seen = Witness(trainer) if witness else None
    if dist.get_world_size() > 1 and trainer.parallel_dims.tp == 1:
        torch.manual_seed(100 + dist.get_rank())
    trainer.train()
    log = folder / name / "critical_sharpness.jsonl"
    result: dict[str, Any] = {"digest": digest(trainer), "class": type(trainer).__name__}
    dist.barrier()
    result["records"] = records = (
        [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    )
    if seen is not None:
        result["anew"] = [
            losses_anew(trainer, seen.steps[r["iteration"]], r, options.get("dropout", 0.1))
            for r in records
        ]
    lines = lines_of(logger.name)
    trainer.close()
    result["verdict"] = [line for line in lines if "verdict" in line]
    result["curves"] = curves(folder / name)
    return result


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.rglob("events.out.tfevents*")):
        reader = EventAccumulator(str(path)).Reload()
        for tag in reader.Tags()["scalars"]:
            found[tag] = [(point.step, point.value) for point in reader.Scalars(tag)]
    return found


def refusals(folder: Path) -> list[str]:
    reasons = []
    for section, field, value in (
        ("training", "disable_cuda_graphs", False),
        ("parallelism", "context_parallel_degree", 2),
    ):
        config = configure(folder, every=2)
        setattr(getattr(config, section), field, value)
        try:
            config.build()
        except InputError as error:
            reasons.append(str(error))
    return reasons


def without_and_with(folder: Path, witness: bool = True, **options: Any) -> dict[str, Any]:
    return {
        "off": run(folder, "off", every=-1, **options),
        "on": run(folder, "on", every=2, witness=witness, **options),
    }


def alone(folder: Path) -> dict[str, Any]:
    def saving() -> Any:
        return CheckpointManager.Config(enable=True, interval=3, last_save_model_only=False)

    # torchtitan's checkpoints have no random states, since its models draw nothing.
    drawing_nothing = {"dropout": 0.0}
    results = without_and_with(folder) | {
        "at every=0": run(folder, "at every=0", every=0, chunked=True),
        "chunked": run(folder, "chunked", every=2, chunked=True),
        "saved off": run(folder, "saved off", every=-1, checkpoint=saving(), **drawing_nothing),
        "saved": run(folder, "saved", every=2, checkpoint=saving(), **drawing_nothing),
    }
    for name, start in (("resumed", "saved"), ("resumed from without", "saved off")):
        checkpoint = saving()
        if start == "saved off":
            checkpoint.exclude_from_loading = ["critical_sharpness"]
        shutil.copytree(
            folder / start / "checkpoint" / "step-3", folder / name / "checkpoint" / "step-3"
        )
        results[name] = run(folder, name, every=2, checkpoint=checkpoint, **drawing_nothing)
    results["refusals"] = refusals(folder)
    return results


#: On two processes. What a witness cannot see are the masks of tensor parallelism, which are no
#: single process's, and compiled layers.
PAIRS: dict[str, dict[str, Any]] = {
    "fsdp": {"parallelism": ParallelismConfig()},
    "tp": {
        "parallelism": ParallelismConfig(spmd_backend="partial_dtensor", tensor_parallel_degree=2),
        "witness": False,
    },
    "pp": {"parallelism": ParallelismConfig(pipeline_parallel_degree=2), "layers": 4},
    "interleaved, compiled": {
        "parallelism": ParallelismConfig(
            spmd_backend="partial_dtensor",
            pipeline_parallel_degree=2,
            pipeline_parallel_schedule="Interleaved1F1B",
        ),
        "compile": CompileConfig(enable=True, components=["model"], backend="aot_eager"),
        "layers": 4,
        "witness": False,
    },
    "experts": {"parallelism": ParallelismConfig(expert_parallel_degree=2), "experts": True},
}


def main(folder: Path) -> None:
    if dist.is_available() and "RANK" in os.environ and os.environ["WORLD_SIZE"] != "1":
        results = {
            name: without_and_with(folder / name, **options) for name, options in PAIRS.items()
        }
    else:
        results = {"single": alone(folder)}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
