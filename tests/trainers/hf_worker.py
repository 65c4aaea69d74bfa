"""Trains a tiny OLMo-2 with the ``Trainer``, without and with measurement, and writes what it saw.

Started by ``test_hf.py``, one process a rank: ``python -m tests.trainers.hf_worker FOLDER``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    Olmo2Config,
    Olmo2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from . import accelerate_cpu  # noqa: F401  isort: skip

from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.trainers.hf import CriticalSharpnessCallback
from tests.digest import hash_of, random_states
from tests.running_norm import RunningNorm

CONFIG = Olmo2Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    attention_dropout=0.1,
    pad_token_id=0,
    eos_token_id=1,
    use_cache=False,
)
STEPS = 8

#: How the processes of a layout share a model that transformers loads.
LOADED = {"fsdp2": {"fsdp_size": 2}, "tp": {"tp_plan": "auto"}}

#: Accelerate shards a model itself.
SHARDED = {
    "fsdp": True,
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["Olmo2DecoderLayer"]},
}


def dataset() -> list[dict[str, Tensor]]:
    """Sequences in which a token predicts the next; every one with another number of labels."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(96):
        start = torch.randint(1, 64, (1,), generator=generator)
        tokens = (start + 3 * torch.arange(16)) % 63 + 1
        labels = tokens.clone()
        labels[: 1 + index % 7] = -100
        examples.append({"input_ids": tokens, "labels": labels})
    return examples


class Records(list[Measurement]):
    """A sink."""

    def write(self, measurement: Measurement) -> None:
        self.append(measurement)


class TrainerThatAverages(Trainer):
    """Appends to its logs what has gathered since the last ones, as TRL's trainers do."""

    seen = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.seen += 1
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | {"micro_batches": float(self.seen)}, *args, **kwargs)
        self.seen = 0


class Witness(TrainerCallback):
    """Keeps what it takes to evaluate each step's loss anew, without the package."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def weights(self) -> dict[str, Tensor]:
        return whole(self.model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.model = model
        model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.passes: list[Any] = []

    def keep(self, _: Any, __: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self.passes.append((kwargs["input_ids"], kwargs["labels"], torch.get_rng_state()))

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        lr = optimizer.param_groups[0]["lr"]
        self.steps.append({"before": self.weights(), "lr": lr, "passes": self.passes})

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.steps[-1]["after"] = self.weights()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def losses_anew(
    step: dict[str, Any], record: dict[str, Any], copies: int = 1
) -> dict[str, float]:
    """L(θ), L(lower), L(upper) and ⟨g, Δθ⟩, from the definitions.

    Args:
        copies: how many ranks have each sample.
    """
    model = Olmo2ForCausalLM(copy.deepcopy(CONFIG)).train()
    update = {
        name: (start - step["after"][name]) / step["lr"] for name, start in step["before"].items()
    }

    def sums(eta: float, backward: bool = False) -> list[float]:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(step["before"][name] - eta * update[name])
        total, tokens = 0.0, 0
        for input_ids, labels, random_state in step["passes"]:
            torch.set_rng_state(random_state)
            logits = model(input_ids=input_ids).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            if backward:
                loss.backward()
            total += loss.item()
            tokens += int(labels[:, 1:].ne(-100).sum())
        return [total, tokens]

    state = torch.get_rng_state()
    loss, tokens = reduced(sums(0.0, backward=True))
    slope = sum(float((p.grad * update[name]).sum()) for name, p in model.named_parameters())
    anew = {"loss": loss / tokens, "tokens": tokens / copies, "slope": reduced([slope])[0] / tokens}
    for end in ("lower", "upper"):
        anew[end] = reduced(sums(record[f"critical_lr_{end}"]))[0] / tokens
    torch.set_rng_state(state)
    return anew


def reduced(values: list[float]) -> list[float]:
    sums = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def digest(trainer: Trainer) -> dict[str, str]:
    """Hashes of what training ends with, on this rank."""

    optimizer = trainer.optimizer.state_dict()["state"]
    return {
        "parameters": hash_of(trainer.model.parameters()),
        "buffers": hash_of(trainer.model.buffers()),
        "optimizer": hash_of(entry for state in optimizer.values() for entry in state.values()),
        "random": random_states(),
    }


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that accelerate's wrap, however often."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    return [
        len(model._forward_pre_hooks),
        len(optimizer._optimizer_step_pre_hooks),
        len(optimizer._optimizer_step_post_hooks),
    ]


class Runs:
    def __init__(self, folder: Path, layout: str) -> None:
        self.folder, self.layout = folder, layout
        self.data = dataset()

    def model(self, kind: type[Olmo2ForCausalLM] = Olmo2ForCausalLM) -> Olmo2ForCausalLM:
        torch.manual_seed(0)
        if self.layout not in LOADED:
            return kind(copy.deepcopy(CONFIG))
        # Transformers shards a model that it loads.
        weights = self.folder / "weights"
        if dist.get_rank() == 0:
            Olmo2ForCausalLM(copy.deepcopy(CONFIG)).save_pretrained(weights)
        dist.barrier()
        return kind.from_pretrained(
            weights, distributed_config=DistributedConfig(**LOADED[self.layout])
        )

    def __call__(
        self,
        name: str,
        *,
        every: int = 0,
        accumulate: int = 1,
        witness: bool = False,
        resume: Path | None = None,
        trainer_class: Callable[..., Trainer] = Trainer,
        model: type[Olmo2ForCausalLM] = Olmo2ForCausalLM,
        **arguments: Any,
    ) -> dict[str, Any]:
        output = self.folder / name
        args = TrainingArguments(
            **{
                "output_dir": str(output),
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": accumulate,
                "max_steps": STEPS,
                "learning_rate": 3e-3,
                "weight_decay": 0.1,
                "max_grad_norm": 0.5,
                "logging_steps": 1,
                "report_to": "tensorboard",
                "save_strategy": "no",
                "eval_strategy": "steps",
                "eval_steps": 3,
                "use_cpu": True,
                "disable_tqdm": True,
                "seed": 3,
                **(SHARDED if self.layout == "accelerate" else {}),
                **arguments,
            }
        )
        trainer = trainer_class(
            self.model(model), args, train_dataset=self.data, eval_dataset=self.data[:8]
        )
        seen, records = Witness(), Records()
        if witness:
            trainer.add_callback(seen)
        if every:
            trainer.add_callback(CriticalSharpnessCallback(trainer, every=every, sinks=[records]))
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        result = {
            "digest": digest(trainer),
            "logs": trainer.state.log_history,
            "records": [dataclasses.asdict(record) for record in records],
            "output": str(output),
            "hooks": hooks(trainer.model_wrapped, inner(trainer.optimizer)),
            "gathered": getattr(trainer, "gathered", None),
            "replaced": sorted({"compute_loss", "log"} & vars(trainer).keys()),
        }
        if witness:
            gathered = [result["records"]]
            if dist.is_initialized():
                dist.broadcast_object_list(gathered)
            copies = 2 if self.layout == "tp" else 1
            result["anew"] = [
                losses_anew(seen.steps[record["iteration"] - 1], record, copies)
                for record in gathered[0]
            ]
        return result


class TrainerWithALossOfItsOwn(Trainer):
    """Differentiates what :meth:`own_loss` gives."""

    def own_loss(self, model: nn.Module, inputs: dict[str, Tensor], items: Any) -> tuple[Any, Any]:
        """The loss, and the outputs of the model."""
        return super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, outputs = self.own_loss(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class TrainerThatAveragesMeans(TrainerWithALossOfItsOwn):
    """Calls the model as before there was num_items_in_batch."""

    def own_loss(self, model: nn.Module, inputs: dict[str, Tensor], items: Any) -> tuple[Any, Any]:
        outputs = model(**inputs)
        return outputs["loss"], outputs


class TrainerThatAddsToTheLoss(TrainerWithALossOfItsOwn):
    """What is differentiated is more than the model's own loss."""

    def own_loss(self, model: nn.Module, inputs: dict[str, Tensor], items: Any) -> tuple[Any, Any]:
        outputs = model(**inputs, num_items_in_batch=items)
        more = 0.01 * outputs.logits.float().logsumexp(-1).square().mean()
        return outputs["loss"] + more, outputs


class TrainerThatTakesLabelsOut(TrainerWithALossOfItsOwn):
    """The model sees no labels, and later reads of the inputs would not either."""

    def own_loss(self, model: nn.Module, inputs: dict[str, Tensor], items: Any) -> tuple[Any, Any]:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        return summed(outputs.logits, labels) / (items or 1), outputs


class TrainerThatCallsTwice(TrainerWithALossOfItsOwn):
    """R-Drop: two passes with other dropout masks."""

    def own_loss(self, model: nn.Module, inputs: dict[str, Tensor], items: Any) -> tuple[Any, Any]:
        first, second = (model(**inputs, num_items_in_batch=items) for _ in range(2))
        return (first["loss"] + second["loss"]) / 2, first


class TrainerWithATeacher(TrainerWithALossOfItsOwn):
    """Distils from a model that it holds, in training mode: its buffers move on, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = copy.deepcopy(CONFIG)
        config.attention_dropout = 0.0
        self.teacher = RunningOlmo2(config).train()

    def own_loss(self, model: nn.Module, inputs: dict[str, Tensor], items: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            wanted = self.teacher(input_ids=inputs["input_ids"]).logits.softmax(-1)
        outputs = model(**inputs, num_items_in_batch=items)
        apart = F.cross_entropy(outputs.logits.flatten(0, 1), wanted.flatten(0, 1))
        return outputs["loss"] + apart, outputs


class TrainerThatGathers(TrainerWithALossOfItsOwn):
    """Gathers numbers in compute_loss and logs them there, as TRL's trainers do; its loss depends
    on how many there are."""

    def own_loss(self, model: nn.Module, inputs: dict[str, Tensor], items: Any) -> tuple[Any, Any]:
        if not hasattr(self, "gathered"):
            self.gathered: dict[str, list[float]] = {"losses": [], "calls": []}
        outputs = model(**inputs, num_items_in_batch=items)
        loss = outputs["loss"] * (1 + 0.1 * len(self.gathered["losses"]))
        self.gathered["losses"].append(loss.item())
        self.gathered["calls"] = [*self.gathered["calls"], self.state.global_step]
        self.log({"in_compute_loss": loss.item()})
        return loss, outputs


class TrainerWithAStepOfItsOwn(Trainer):
    """Differentiates the two halves of each micro-batch one after the other."""

    def training_step(self, model: nn.Module, inputs: Any, items: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=items)
        self.accelerator.backward(loss / 2, retain_graph=True)
        self.accelerator.backward(loss / 2)
        return loss.detach()


class MeanOlmo2(Olmo2ForCausalLM):
    """As of before there was num_items_in_batch."""

    accepts_loss_kwargs = False


class RunningOlmo2(Olmo2ForCausalLM):
    def __init__(self, config: Olmo2Config) -> None:
        super().__init__(config)
        self.model.norm = RunningNorm(config.hidden_size)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    flat = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum")


def summed_outputs(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """A ``compute_loss_func``."""
    return summed(outputs.logits, labels) / (num_items_in_batch or 1)


#: Whose loss is not the model's own, or a mean.
LOSSES: dict[str, dict[str, Any]] = {
    "added": {"trainer_class": TrainerThatAddsToTheLoss},
    "labels taken out": {"trainer_class": TrainerThatTakesLabelsOut},
    "means": {"trainer_class": TrainerThatAveragesMeans},
    "twice": {"trainer_class": TrainerThatCallsTwice},
    "teacher": {"trainer_class": TrainerWithATeacher},
    "gathers": {"trainer_class": TrainerThatGathers},
    "smoothed": {"label_smoothing_factor": 0.1},
    "function": {"trainer_class": functools.partial(Trainer, compute_loss_func=summed_outputs)},
    "without items": {"model": MeanOlmo2},
    "without items, smoothed": {"model": MeanOlmo2, "label_smoothing_factor": 0.1},
    "buffers": {"model": RunningOlmo2},
}


def losses(runs: Runs, *names: str) -> dict[str, Any]:
    short = {"accumulate": 2, "max_steps": 3, "eval_strategy": "no", "report_to": "none"}
    return {
        name: {
            "off": runs(f"{name} off", **short, **LOSSES[name]),
            "on": runs(name, every=1, **short, **LOSSES[name]),
        }
        for name in names
    }


def without_and_with(runs: Runs) -> dict[str, Any]:
    return {
        "off": runs("off", accumulate=2),
        "on": runs("on", accumulate=2, every=2, witness=True),
    }


def saved_and_resumed(runs: Runs) -> dict[str, Any]:
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    saved = runs("saved", **saving, every=2)
    return {
        "saved off": runs("saved off", **saving),
        "saved": saved,
        "resumed": runs(
            "resumed", **saving, every=2, resume=runs.folder / "saved" / "checkpoint-3"
        ),
    }


def alone(folder: Path) -> dict[str, Any]:
    runs = Runs(folder, "single")
    saving = {"save_strategy": "steps", "save_steps": 5}
    averages = {"logging_steps": 3, "trainer_class": TrainerThatAverages}
    results = without_and_with(runs) | {
        "losses": losses(runs, *LOSSES),
        "averages off": runs("averages off", **averages),
        "averages on": runs("averages on", **averages, every=2),
        "ended armed": runs("ended armed", every=3),
        "own step": runs("own step", every=4, trainer_class=TrainerWithAStepOfItsOwn),
        "bf16": runs("bf16", every=4, bf16=True),
        "saved off": runs("saved off", **saving),
        "saved": runs("saved", **saving, every=2),
    }
    for name, start, arguments in (
        ("resumed", "saved", {}),
        ("resumed callbacks", "saved", {"restore_callback_states_from_checkpoint": True}),
        ("resumed from without", "saved off", {"save_strategy": "steps", "save_steps": 6}),
    ):
        results[name] = runs(name, every=2, resume=folder / start / "checkpoint-5", **arguments)
    return results


def main(folder: Path) -> None:
    if "RANK" not in os.environ:
        (folder / "rank0.json").write_text(json.dumps({"single": alone(folder)}))
        return
    dist.init_process_group("gloo")
    results = {
        layout: without_and_with(Runs(folder / layout, layout)) for layout in ("ddp", "fsdp2", "tp")
    }
    runs = Runs(folder / "losses", "ddp")
    results["ddp"]["losses"] = losses(runs, "gathers", "smoothed", "without items", "buffers")
    runs = Runs(folder / "tp", "tp")
    results["tp"]["losses"] = losses(runs, "without items")
    runs = Runs(folder / "accelerate", "accelerate")  # the last: accelerate's state is global
    results["accelerate"] = without_and_with(runs) | saved_and_resumed(runs)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
