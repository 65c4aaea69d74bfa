"""Trains a tiny OLMo with OLMo-core, without and with measurement, and writes what it saw.

Started by ``test_olmo_core.py``, one process a rank:
``python -m tests.trainers.olmo_core_worker FOLDER``.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.distributed import parallel
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig, CosWithWarmup
from olmo_core.train import Duration, TrainerConfig
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from olmo_core.train.common import StepSkipRange
from olmo_core.train.train_module import (
    TransformerDataParallelConfig,
    TransformerTensorParallelConfig,
    TransformerTrainModuleConfig,
)
from olmo_core.utils import seed_all
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.trainers.olmo_core import CriticalSharpnessCallback
from tests.digest import hash_of, random_states
from tests.trainers.harness import lines_of

LENGTH, STEPS = 16, 8
TOKENIZER = TokenizerConfig(vocab_size=64, eos_token_id=0, pad_token_id=0)
SIZES: dict[str, Any] = {"d_model": 32, "vocab_size": 64, "n_layers": 2, "n_heads": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {"dp_config": TransformerDataParallelConfig(name=DataParallelType.ddp)},
    "fsdp": {"dp_config": TransformerDataParallelConfig(name=DataParallelType.fsdp)},
    "tp": {
        "dp_config": TransformerDataParallelConfig(name=DataParallelType.fsdp),
        "tp_config": TransformerTensorParallelConfig(degree=2),
    },
}


def model_config(dropout: float = 0.1) -> TransformerConfig:
    config = TransformerConfig.llama_like(**SIZES, hidden_size_multiple_of=32)
    config.block.dropout = dropout
    return config


def write_data(folder: Path) -> dict[str, list[str]]:
    """Sequences in which a token predicts the next; every one with another number of labels."""
    folder.mkdir(parents=True, exist_ok=True)
    start = np.random.default_rng(1).integers(1, 64, size=(96, 1))
    tokens = (start + 3 * np.arange(LENGTH)) % 63 + 1
    mask = np.arange(LENGTH) > np.arange(96)[:, None] % 7
    paths = {"paths": folder / "tokens.npy", "label_mask_paths": folder / "mask.npy"}
    if not paths["label_mask_paths"].exists():
        # OLMo-core reads raw memory, whatever the file is called.
        tokens.astype(np.uint8).tofile(paths["paths"])
        mask.tofile(paths["label_mask_paths"])
    return {name: [str(path)] for name, path in paths.items()}


@dataclass
class Witness(Callback):
    """Keeps the metrics, and what it takes to evaluate each step's loss anew."""

    keep: bool = False
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)

    def pre_step(self, batch: dict[str, Any]) -> None:
        if not self.keep:
            return
        model = self.trainer.train_module.model
        seen = {"batch": dict(batch), "before": whole(model), "random": []}
        self.steps[self.step] = seen
        self._handle = model.register_forward_pre_hook(
            lambda *_: seen["random"].append(torch.get_rng_state())
        )

    def pre_optim_step(self) -> None:
        if self.keep:
            self._handle.remove()
            self.trainer.train_module.optim.register_step_post_hook(self.after)

    def after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        model = self.trainer.train_module.model
        self.steps[self.step] |= {"after": whole(model), "lr": optimizer.param_groups[0]["lr"]}

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics.setdefault(step, {}).update(metrics)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def losses_anew(step: dict[str, Any], record: dict[str, Any], data_ranks: int) -> dict[str, float]:
    """L(θ), L(lower), L(upper) and ⟨g, Δθ⟩, from the definitions, with OLMo-core's own weights:
    each rank's mean counts the same."""
    model = model_config().build(init_device="cpu").train()
    update = {
        name: (start - step["after"][name]) / step["lr"] for name, start in step["before"].items()
    }
    tokens = step["batch"]["input_ids"]
    labels = tokens.masked_fill(~step["batch"]["label_mask"], -100)[:, 1:]
    count = int(labels.ne(-100).sum())

    def mean(eta: float, backward: bool = False) -> float:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(step["before"][name] - eta * update[name])
        total = 0.0
        parts = len(step["random"])
        for part, targets, state in zip(
            tokens.chunk(parts), labels.chunk(parts), step["random"], strict=True
        ):
            torch.set_rng_state(state)
            logits = model(part)[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            if backward:
                loss.backward()
            total += loss.item()
        return reduced(total / count) / world()

    saved = torch.get_rng_state()
    anew = {"loss": mean(0.0, backward=True), "tokens": reduced(count) * data_ranks / world()}
    slope = sum(float((p.grad * update[name]).sum()) for name, p in model.named_parameters())
    anew["slope"] = reduced(slope / count) / world()
    for end in ("lower", "upper"):
        anew[end] = mean(record[f"critical_lr_{end}"])
    torch.set_rng_state(saved)
    return anew


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def reduced(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


def digest(train_module: Any) -> dict[str, str]:
    """Hashes of what training ends with, on this rank."""

    model, optimizer = train_module.model, train_module.optim
    return {
        "parameters": hash_of(model.parameters()),
        "buffers": hash_of(model.buffers()),
        "optimizer": hash_of(v for state in optimizer.state.values() for v in state.values()),
        "random": random_states(),
        "hooks": repr([len(module._forward_pre_hooks) for module in model.modules()]),
    }


def run(
    folder: Path,
    name: str,
    layout: str,
    *,
    every: int = 0,
    witness: bool = False,
    save_every: int = 1000,
    load: Path | None = None,
    dropout: float = 0.1,
    skip: tuple[int, int] | None = None,
) -> dict[str, Any]:
    seed_all(3)
    parallel._WORLD_MESH = None  # it can be made once a process otherwise
    dataset = NumpyFSLDatasetConfig(
        **write_data(folder / "data"),
        sequence_length=LENGTH,
        tokenizer=TOKENIZER,
        work_dir=str(folder / "cache"),
    ).build()
    data_ranks = 1 if layout in ("single", "tp") else 2
    train_module = TransformerTrainModuleConfig(
        rank_microbatch_size=8 * LENGTH // data_ranks // 2,
        max_sequence_length=LENGTH,
        optim=AdamWConfig(lr=3e-3, weight_decay=0.1),
        scheduler=CosWithWarmup(warmup_steps=2),
        max_grad_norm=0.5,
        **LAYOUTS[layout],
    ).build(model_config(dropout).build(init_device="meta"))
    loader = NumpyDataLoaderConfig(global_batch_size=8 * LENGTH, seed=0).build(
        dataset, dp_process_group=train_module.dp_process_group
    )
    seen = Witness(keep=witness)
    config = TrainerConfig(
        save_folder=str(folder / name),
        load_path=str(load) if load else None,
        save_overwrite=True,
        metrics_collect_interval=3,
        max_duration=Duration.steps(STEPS),
        steps_to_skip=[StepSkipRange(*skip)] if skip else None,
        callbacks={
            "checkpointer": CheckpointerCallback(
                save_interval=save_every, pre_train_checkpoint=False, save_async=False
            ),
            "witness": seen,
        },
    )
    if every:
        config = config.with_callback("critical_sharpness", CriticalSharpnessCallback(every=every))
    trainer = config.build(train_module, loader)
    seed_all(4 + (dist.get_rank() if layout in ("ddp", "fsdp") else 0))
    lines = lines_of("megatron_sharpness.trainers.olmo_core")
    trainer.fit()
    log = folder / name / "critical_sharpness.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if every else []
    result = {"digest": digest(train_module), "metrics": trainer.callbacks["witness"].metrics}
    result["records"] = records
    result["verdict"] = [line for line in lines if "verdict" in line]
    if witness:
        result["anew"] = [
            losses_anew(trainer.callbacks["witness"].steps[r["iteration"]], r, data_ranks)
            for r in records
            if r["status"] == "found"
        ]
    return result


def refusals() -> list[str]:
    from types import SimpleNamespace

    from olmo_core.train.train_module import BasicTrainModule

    model = TransformerConfig.ngpt_like(**SIZES).build()
    basic = BasicTrainModule(model, torch.optim.SGD(model.parameters(), lr=0.1), LENGTH)
    normalized = TransformerTrainModuleConfig(
        rank_microbatch_size=LENGTH, max_sequence_length=LENGTH, optim=AdamWConfig()
    ).build(model)
    reasons = []
    for module in (basic, normalized):
        callback = CriticalSharpnessCallback()
        callback.trainer = SimpleNamespace(train_module=module)
        try:
            callback.pre_train()
        except InputError as error:
            reasons.append(str(error))
    return reasons


def config_round_trip() -> dict[str, Any]:
    """Through the configuration file and overrides of the command line."""
    config = TrainerConfig(save_folder="somewhere").with_callback(
        "critical_sharpness", CriticalSharpnessCallback(every=10)
    )
    config = TrainerConfig.from_dict(json.loads(json.dumps(config.as_config_dict())))
    config = config.merge(
        ["callbacks.critical_sharpness.every=20", "callbacks.critical_sharpness.tolerance=0.01"]
    )
    callback = config.callbacks["critical_sharpness"]
    return {
        "type": type(callback).__name__,
        "every": callback.every,
        "tolerance": callback.tolerance,
    }


def without_and_with(folder: Path, layout: str) -> dict[str, Any]:
    return {
        "off": run(folder, "off", layout),
        # The masks of dropout under tensor parallelism are no single process's.
        "on": run(folder, "on", layout, every=2, witness=layout != "tp"),
    }


def alone(folder: Path) -> dict[str, Any]:
    # The trainer's dry run draws from the random states that it has loaded: without dropout, then.
    resume: dict[str, Any] = {"dropout": 0.0, "every": 2}
    return without_and_with(folder, "single") | {
        "saved off": run(folder, "saved off", "single", save_every=4, dropout=0.0),
        "saved": run(folder, "saved", "single", save_every=4, **resume),
        "resumed": run(folder, "resumed", "single", load=folder / "saved" / "step4", **resume),
        "resumed from without": run(
            folder, "resumed from without", "single", load=folder / "saved off" / "step4", **resume
        ),
        "skipping off": run(folder, "skipping off", "single", skip=(4, 6)),
        "skipping": run(folder, "skipping", "single", every=2, skip=(4, 6)),
        "refusals": refusals(),
        "config": config_round_trip(),
    }


def main(folder: Path) -> None:
    if "RANK" not in os.environ:
        (folder / "rank0.json").write_text(json.dumps({"single": alone(folder)}))
        return
    dist.init_process_group("gloo")
    results = {
        layout: without_and_with(folder / layout, layout) for layout in ("ddp", "fsdp", "tp")
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
