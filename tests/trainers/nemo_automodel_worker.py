"""Trains a tiny Llama with NeMo AutoModel, without and with measurement, and writes what it saw.

Started by ``test_nemo_automodel.py``, one process a rank:
``python -m tests.trainers.nemo_automodel_worker FOLDER``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from . import nemo_automodel_cpu  # noqa: F401  isort: skip

from nemo_automodel.cli.app import main as automodel
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.trainers.nemo_automodel import CriticalSharpnessRecipe
from tests.digest import hash_of, random_states
from tests.processes import ROOT
from tests.trainers.harness import lines_of

LENGTH, STEPS = 16, 6
MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "architectures": ["LlamaForCausalLM"],
}


class Rows(Dataset[dict[str, list[int]]]):
    """Sequences in which a token predicts the next; every one with another number of labels."""

    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        text = (7 * i + 3 * torch.arange(LENGTH + 1)) % 61
        labels = text[1:].clone()
        labels[: 1 + i % 4] = -100
        return {"input_ids": text[:-1].tolist(), "labels": labels.tolist()}


def configure(folder: Path, *, every: int | None, dropout: float = 0.1, **sections: Any) -> Any:
    """``every`` None: without the section, for the recipe of AutoModel itself."""
    llama = MODEL | {"_target_": "transformers.LlamaConfig", "attention_dropout": dropout}
    fp32 = {"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"}
    config = {
        "seed": 3,
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": llama,
            "torch_dtype": "float32",
            "attn_implementation": "eager",
        },
        "dist_env": {"backend": "gloo"},
        "distributed": {"strategy": "fsdp2", "mp_policy": fp32},
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {"_target_": Rows},
        "dataloader": {"collate_fn": "nemo_automodel.components.datasets.utils.default_collater"},
        "step_scheduler": {
            "global_batch_size": 8,
            "local_batch_size": 2,
            "max_steps": STEPS,
            "num_epochs": 1,
            "ckpt_every_steps": 3,
        },
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 3e-3},
        "lr_scheduler": {"lr_decay_style": "cosine", "lr_warmup_steps": 2, "min_lr": 1e-4},
        "checkpoint": {
            "checkpoint_dir": str(folder),
            "enabled": False,
            "model_save_format": "torch_save",
            "save_consolidated": False,
        },
        "clip_grad_norm": {"max_norm": 0.5},
        **sections,
    }
    if every is not None:
        config["critical_sharpness"] = {"every": every}
    return ConfigNode(config)


class Witness:
    """Keeps what it takes to evaluate each step's loss anew, without the package."""

    def __init__(self, recipe: Any) -> None:
        self.recipe, self.steps = recipe, {}
        (self.model,) = recipe.model_parts
        self.model.register_forward_pre_hook(self.forward)
        recipe.optimizer[0].register_step_pre_hook(self.before)
        recipe.optimizer[0].register_step_post_hook(self.after)
        self.states: list[Tensor] = []
        train_step = recipe._run_train_optim_step

        def keep_and_train(batches: Any, *args: Any) -> Any:
            self.steps[recipe.step_scheduler.step] = {"batches": batches}
            return train_step(batches, *args)

        recipe._run_train_optim_step = keep_and_train

    def forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.states.append(torch.get_rng_state())

    def before(self, optimizer: Any, *_: Any) -> None:
        self.steps[self.recipe.step_scheduler.step] |= {
            "before": whole(self.model),
            "lr": optimizer.param_groups[0]["lr"],
            "random": self.states,
        }
        self.states = []

    def after(self, *_: Any) -> None:
        self.steps[self.recipe.step_scheduler.step]["after"] = whole(self.model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights; the names are those of the model that DDP wraps."""
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p)
        .detach()
        .clone()
        for name, p in model.named_parameters()
    }


def losses_anew(
    step: dict[str, Any], record: dict[str, Any], dropout: float, copies: int
) -> dict[str, float]:
    """L(θ), L(lower), L(upper) and ⟨g, Δθ⟩, from the definitions, with transformers' own model.

    Args:
        copies: how many ranks have the same batches.
    """
    config = LlamaConfig(**MODEL, attention_dropout=dropout, attn_implementation="eager")
    saved = torch.get_rng_state()
    model = LlamaForCausalLM(config).train()
    update = {
        name: (start - step["after"][name]) / step["lr"] for name, start in step["before"].items()
    }
    labels = [batch["labels"] for batch in step["batches"]]
    tokens = reduced(sum(int(part.ne(-100).sum()) for part in labels)) / copies

    def loss(eta: float, backward: bool = False) -> float:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(step["before"][name] - eta * update[name])
        total = 0.0
        for batch, state in zip(step["batches"], step["random"], strict=True):
            torch.set_rng_state(state)
            logits = model(input_ids=batch["input_ids"]).logits.float()
            part = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            if backward:
                part.backward()
            total += part.item()
        return reduced(total) / copies / tokens

    anew = {"loss": loss(0.0, backward=True), "tokens": tokens}
    slope = sum(float((p.grad * update[name]).sum()) for name, p in model.named_parameters())
    anew["slope"] = reduced(slope) / copies / tokens
    for end in ("lower", "upper"):
        anew[end] = loss(record[f"critical_lr_{end}"])
    torch.set_rng_state(saved)
    return anew


def reduced(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def digest(recipe: Any) -> dict[str, str]:
    """Hashes of what training ends with, on this rank."""
    (model,) = recipe.model_parts
    return {
        "parameters": hash_of(model.parameters()),
        "buffers": hash_of(model.buffers()),
        "optimizer": hash_of(v for s in recipe.optimizer[0].state.values() for v in s.values()),
        "random": random_states(),
        "recipe": hash_of(
            recipe.step_scheduler.state_dict(),
            recipe.lr_scheduler[0].state_dict(),
            recipe.dataloader.state_dict(),
        ),
    }


def run(
    folder: Path, name: str, *, every: int | None, witness: bool = False, **options: Any
) -> dict[str, Any]:
    kind = TrainFinetuneRecipeForNextTokenPrediction if every is None else CriticalSharpnessRecipe
    recipe = kind(configure(folder / name, every=every, **options))
    recipe.setup()
    seen = Witness(recipe) if witness else None
    lines = lines_of(logging.getLogger().name)
    recipe.run_train_validation_loop()
    dist.barrier()
    log = folder / name / "critical_sharpness.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    result = {
        "digest": digest(recipe),
        "class": type(recipe).__name__,
        "trained": [n for n, p in recipe.model_parts[0].named_parameters() if p.requires_grad],
        "records": records,
        "verdict": [line for line in lines if "verdict" in line],
        "logged": [
            json.loads(line) for line in (folder / name / "training.jsonl").read_text().splitlines()
        ],
    }
    if seen is not None:
        copies = dist.get_world_size() // recipe._get_dp_group_size()
        dropout = options.get("dropout", 0.1)
        result["anew"] = [
            losses_anew(seen.steps[record["iteration"]], record, dropout, copies)
            for record in records
        ]
    return result


def without_and_with(folder: Path, witness: bool = True, **options: Any) -> dict[str, Any]:
    return {
        "off": run(folder, "off", every=None, **options),
        "on": run(folder, "on", every=2, witness=witness, **options),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Runs that go on from the third step of one that measured, and of one that did not."""

    def saving(name: str) -> dict[str, Any]:
        off = configure(folder / name, every=None).checkpoint.to_dict()
        # A training with dropout that AutoModel resumes draws other masks, measured or not.
        return {"checkpoint": off | {"enabled": True}, "dropout": 0.0}

    results = {
        "saved off": run(folder, "saved off", every=None, **saving("saved off")),
        "saved": run(folder, "saved", every=2, **saving("saved")),
    }
    for name, start in (("resumed", "saved"), ("resumed from without", "saved off")):
        (kept,) = folder.glob(f"{start}/epoch_*_step_2")
        if dist.get_rank() == 0:
            shutil.copytree(kept, folder / name / kept.name)
        dist.barrier()
        results[name] = run(folder, name, every=2, **saving(name))
    return results


def refusals(folder: Path) -> list[str]:
    reasons = []
    for section in (
        {"distributed": {"pp_size": 2}},
        {"distributed": {"cp_size": 2, "ep_size": 2}},
        {"distributed": {"strategy": "megatron_fsdp"}},
        {"domain_mixture": {"weights": {}}},
    ):
        try:
            CriticalSharpnessRecipe(configure(folder, every=2, **section))
        except InputError as error:
            reasons.append(str(error))
    return reasons


def page(folder: Path) -> list[dict[str, Any]]:
    """The records of the configuration that the page begins with, by AutoModel's own command."""
    text = (ROOT / "docs" / "nemo_automodel.md").read_text()
    snippet = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert snippet is not None
    (folder / "page.yaml").write_text(snippet[1])
    os.chdir(folder)
    sys.argv = ["automodel", "page.yaml", "--dist_env.backend", "gloo"]
    automodel()
    lines = (folder / "runs" / "automodel" / "critical_sharpness.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def alone(folder: Path) -> dict[str, Any]:
    lora = {
        "peft": {
            "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
            "target_modules": "*_proj",
            "dim": 4,
            "use_triton": False,
        }
    }
    return without_and_with(folder) | {
        "at every=0": run(folder, "at every=0", every=0),
        "lora": without_and_with(folder / "lora", witness=False, **lora),
        **resumed(folder),
        "refusals": refusals(folder),
        "page": page(folder),
    }


def main(folder: Path) -> None:
    if os.environ["WORLD_SIZE"] == "1":
        results = {"single": alone(folder)}
    else:
        fp32 = configure(folder, every=None).distributed.to_dict()
        results = {
            "fsdp2": without_and_with(folder / "fsdp2") | resumed(folder / "fsdp2"),
            "bf16": without_and_with(folder / "bf16", False, distributed={"strategy": "fsdp2"}),
            "ddp": without_and_with(folder / "ddp", distributed={"strategy": "ddp"}),
            # The masks of dropout under tensor parallelism are no single process's.
            "tp": without_and_with(folder / "tp", dropout=0.0, distributed=fp32 | {"tp_size": 2}),
        }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
