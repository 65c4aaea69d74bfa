"""Trains a tiny model with Lightning, without and with measurement, and writes what it saw.

Started by ``test_lightning.py``, one process a rank:
``python -m tests.trainers.lightning_worker FOLDER``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.trainers.lightning import CriticalSharpnessCallback
from tests.digest import hash_of, random_states
from tests.running_norm import RunningNorm

VOCABULARY, WIDTH, LENGTH = 61, 32, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm(x))


def language_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH), Block(), Block(), nn.Linear(WIDTH, VOCABULARY)
    )


def loss_sum(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = language_model()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for block in (self.model[1], self.model[2], self.model):
                fully_shard(block, mesh=mesh)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return [optimizer], [{"scheduler": decay, "interval": "step"}]

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.current_epoch)  # Lightning's checkpoints hold no random states

    def sum_and_tokens(self, batch: Any) -> tuple[Tensor, int]:
        return loss_sum(self.model, batch[0]), batch[0][:, 1:].numel()

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss, tokens = self.sum_and_tokens(batch)
        self.log("train_loss", loss / tokens)
        return loss / tokens

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", loss_sum(self.model, batch[0]))


class Ragged(Module):
    """Batches of different lengths, whose means count alike in training."""

    def sum_and_tokens(self, batch: Any) -> tuple[Tensor, int]:
        (tokens,) = batch
        length = 5 + int(tokens[0, 0]) % (LENGTH - 4)
        return super().sum_and_tokens((tokens[:, :length],))


class Skipping(Module):
    """Returns no loss for some batches, the first or the last of a step, after random draws."""

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        if index in (2, 7):
            torch.rand(1)
            return None
        return super().training_step(batch, index)


class Counting(Module):
    """Has attributes that a training step reads and changes: a number, a tensor, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.hidden = torch.zeros(WIDTH)
        self.seen: list[Tensor] = []

    def sum_and_tokens(self, batch: Any) -> tuple[Tensor, int]:
        self.count += 1
        features = self.model[:-1](batch[0][:, :-1])
        logits = self.model[-1](features + self.hidden).float()
        self.hidden = 0.5 * self.hidden + features.detach().mean((0, 1))
        loss = F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten(), reduction="sum")
        self.seen.append(loss.detach())
        return loss * (1 + 0.1 * self.count), batch[0][:, 1:].numel()


class Running(Module):
    def __init__(self) -> None:
        super().__init__()
        self.model.insert(3, RunningNorm(WIDTH))


class Records(list[Measurement]):
    """A sink."""

    def write(self, measurement: Measurement) -> None:
        self.append(measurement)


class Witness(pl.Callback):
    """Keeps what it takes to evaluate each step's loss anew, without the package."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.passes: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, _: Any, __: Any, batch: Any, ___: int) -> None:
        self.passes.append((batch[0], torch.get_rng_state()))

    def on_before_optimizer_step(self, _: Any, module: Any, optimizer: Any) -> None:
        lr = optimizer.param_groups[0]["lr"]
        self.steps.append({"before": whole(module), "lr": lr, "passes": self.passes})
        self.passes = []

    def on_train_batch_end(self, _: Any, module: Any, *__: Any) -> None:
        if not self.passes:
            self.steps[-1]["after"] = whole(module)


def whole(module: Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.model.named_parameters()
    }


def losses_anew(
    step: dict[str, Any], record: dict[str, Any], *, autocast: bool
) -> dict[str, float]:
    """L(θ), L(lower), L(upper) and ⟨g, Δθ⟩, from the definitions."""
    state = torch.get_rng_state()
    model = language_model().train()
    update = {
        name: (start - step["after"][name]) / step["lr"] for name, start in step["before"].items()
    }

    def sums(eta: float, backward: bool = False) -> list[float]:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(step["before"][name] - eta * update[name])
        total, count = 0.0, 0
        for tokens, random_state in step["passes"]:
            torch.set_rng_state(random_state)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_sum(model, tokens)
            if backward:
                loss.backward()
            total, count = total + loss.item(), count + tokens[:, 1:].numel()
        return [total, count]

    loss, count = reduced(sums(0.0, backward=True))
    slope = sum(float((p.grad * update[name]).sum()) for name, p in model.named_parameters())
    anew = {"loss": loss / count, "tokens": count, "slope": reduced([slope])[0] / count}
    for end in ("lower", "upper"):
        anew[end] = reduced(sums(record[f"critical_lr_{end}"]))[0] / count
    torch.set_rng_state(state)
    return anew


def reduced(values: list[float]) -> list[float]:
    sums = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def digest(trainer: pl.Trainer, module: Module) -> dict[str, str]:
    """Hashes of what training ends with, on this rank."""

    state = trainer.optimizers[0].state_dict()["state"]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "parameters": hash_of(module.parameters()),
        "buffers": hash_of(module.buffers()),
        "attributes": hash_of([getattr(module, "count", 0), *getattr(module, "seen", [])]),
        "gradients": hash_of(parameter.grad for parameter in module.parameters()),
        "optimizer": hash_of(entry for entries in state.values() for entry in entries.values()),
        "random": random_states(),
        "metrics": hash_of(sorted(metrics.items())),
    }


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    return [
        len(model._forward_pre_hooks),
        len(optimizer._optimizer_step_pre_hooks),
        len(optimizer._optimizer_step_post_hooks),
    ]


class Runs:
    def __init__(self, folder: Path, strategy: Any = "auto", *, precision: str = "32-true") -> None:
        self.folder, self.strategy, self.precision = folder, strategy, precision
        starts = torch.randint(0, VOCABULARY, (96, 1), generator=torch.Generator().manual_seed(1))
        self.data = TensorDataset((starts + 3 * torch.arange(LENGTH + 1)) % VOCABULARY)

    def __call__(
        self,
        name: str,
        *,
        every: int = 0,
        witness: bool = False,
        resume: Path | None = None,
        checkpoint: bool = False,
        module: type[Module] = Module,
        evaluate: Any = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        output = self.folder / name
        strategy = self.strategy() if callable(self.strategy) else self.strategy
        seen, records = Witness(), Records()
        callbacks: list[pl.Callback] = [seen] if witness else []
        if every:
            callbacks.append(
                CriticalSharpnessCallback(
                    evaluate or module.sum_and_tokens, every=every, sinks=[records]
                )
            )
        if checkpoint:
            callbacks.append(
                ModelCheckpoint(
                    output, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
                )
            )
        trainer = pl.Trainer(
            **{
                "accelerator": "cpu",
                "devices": dist_size(),
                "strategy": strategy,
                "precision": self.precision,
                "max_epochs": 2,
                "limit_train_batches": 8,
                "limit_val_batches": 1,
                "val_check_interval": 3,
                "accumulate_grad_batches": 2,
                "gradient_clip_val": 0.5,
                "log_every_n_steps": 3,
                "logger": [CSVLogger(output, "", ""), TensorBoardLogger(output, "", "")],
                "callbacks": callbacks,
                "enable_checkpointing": checkpoint,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **arguments,
            }
        )
        trained = module()
        training, validation = (
            # A loader draws a number each time it starts, and a resumed run starts it once less.
            DataLoader(self.data, batch_size=size, generator=torch.Generator())
            for size in (4, 8)
        )
        trainer.fit(trained, training, validation, ckpt_path=resume)
        result: dict[str, Any] = {
            "digest": digest(trainer, trained),
            "records": [dataclasses.asdict(record) for record in records],
            "output": str(output),
            "hooks": hooks(trained, trainer.optimizers[0]),
        }
        if witness:
            gathered = [result["records"]]
            if dist.is_initialized():
                dist.broadcast_object_list(gathered)
            autocast = self.precision == "bf16-mixed"
            result["anew"] = [
                losses_anew(seen.steps[record["iteration"] - 1], record, autocast=autocast)
                for record in gathered[0]
            ]
        return result


def dist_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def refusals(runs: Runs) -> list[str]:
    reasons = []

    class Manual(Module):
        automatic_optimization = False

    for module, arguments in (
        (Manual(), {}),
        (Module(), {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}),
    ):
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            callbacks=[CriticalSharpnessCallback(Module.sum_and_tokens)],
            **arguments,
        )
        try:
            trainer.fit(module, DataLoader(runs.data, batch_size=4))
        except InputError as error:
            reasons.append(str(error))
    return reasons


def mean_and_tokens(module: Module, batch: Any) -> tuple[Tensor, int]:
    """The mean where the sum belongs."""
    loss, tokens = module.sum_and_tokens(batch)
    return loss / tokens, tokens


def smoothed_sum_and_tokens(module: Module, batch: Any) -> tuple[Tensor, int]:
    """Another loss than training_step's."""
    logits, targets = module.model(batch[0][:, :-1]).float(), batch[0][:, 1:]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=0.1
    )
    return loss, targets.numel()


class OtherBatches:
    """Another batch at each call."""

    def __init__(self, data: Any) -> None:
        self.batches = itertools.cycle(DataLoader(data, batch_size=4))

    def __call__(self, module: Module, _: Any) -> tuple[Tensor, int]:
        return module.sum_and_tokens(next(self.batches))


def without_and_with(runs: Runs) -> dict[str, Any]:
    return {"off": runs("off"), "on": runs("on", every=2, witness=True)}


def modules(runs: Runs, *kinds: type[Module], **arguments: Any) -> dict[str, Any]:
    results = {}
    for kind in kinds:
        name = kind.__name__.lower()
        results[name] = runs(name, every=2, module=kind, **arguments)
        results[f"{name} off"] = runs(f"{name} off", module=kind, **arguments)
    return results


def alone(folder: Path) -> dict[str, Any]:
    runs = Runs(folder)
    return without_and_with(runs) | {
        "refusals": refusals(runs),
        "ended armed": runs("ended armed", every=3),
        **modules(runs, Ragged, Skipping, Counting),
        "mean": runs("mean", every=4, evaluate=mean_and_tokens),
        "another loss": runs("another loss", every=4, evaluate=smoothed_sum_and_tokens),
        "other batches": runs("other batches", every=4, evaluate=OtherBatches(runs.data)),
        "saved off": runs("saved off", checkpoint=True),
        "saved": runs("saved", checkpoint=True, every=2),
        "resumed": runs("resumed", every=2, resume=folder / "saved" / "epoch=0.ckpt"),
        "resumed from without": runs(
            "resumed from without", every=2, resume=folder / "saved off" / "epoch=0.ckpt"
        ),
    }


def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def main(folder: Path) -> None:
    if dist_size() == 1:
        autocast = Runs(folder / "autocast", precision="bf16-mixed")
        results = {"single": alone(folder), "autocast": without_and_with(autocast)}
    else:
        dist.init_process_group("gloo")
        results = {
            "ddp": without_and_with(Runs(folder / "ddp", "ddp")),
            "accumulated": modules(Runs(folder / "accumulated", "ddp"), Running, Counting),
            "each batch": modules(
                Runs(folder / "each batch", "ddp"), Running, accumulate_grad_batches=1
            ),
            "fsdp2": without_and_with(Runs(folder / "fsdp2", fsdp2)),
        }
    rank = int(os.environ.get("RANK", 0))
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
