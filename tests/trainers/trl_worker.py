"""Fine-tunes a tiny OLMo-2 with PEFT and TRL, without and with measurement, and writes what it saw.

Started by ``test_trl.py``: ``python -m tests.trainers.trl_worker FOLDER``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    Olmo2ForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.trainers.hf import CriticalSharpnessCallback
from tests.digest import hash_of, random_states
from tests.processes import ROOT
from tests.trainers import hf_worker
from tests.trainers.hf_worker import CONFIG, Records, dataset, digest, summed

STEPS, BETA = 4, 0.5

#: The adapters of each kind of model; None trains all weights.
ADAPTERS = {
    "all": None,
    "lora": LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"),
    "dora": LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", use_dora=True),
}
ADAPTERS["4 bits"] = ADAPTERS["4 bits, bf16"] = ADAPTERS["8 bits"] = ADAPTERS["lora"]
QUANTIZED = {
    "4 bits": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "4 bits, bf16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
}


def text(start: int, length: int, stride: int) -> str:
    """Words that follow each other as those of :func:`dataset` do, for a stride of 3."""
    return " ".join(f"w{(start + stride * i) % 61}" for i in range(length))


def prompts() -> Iterator[tuple[str, int]]:
    """And with which word each goes on."""
    for i in range(64):
        yield text(7 * i, 3 + i % 4, 3) + " ", 7 * i + 3 * (3 + i % 4)


def completions() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": prompt, "completion": text(then, 2 + i % 5, 3 + i % 2)}
            for i, (prompt, then) in enumerate(prompts())
        ]
    )


def preferences() -> Dataset:
    """Every third is the other way round: no step can go on for ever."""
    rows = []
    for i, (prompt, then) in enumerate(prompts()):
        pair = text(then, 2 + i % 5, 3), text(then, 4, 5)
        chosen, rejected = pair[::-1] if i % 3 else pair
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def train_base(folder: Path) -> None:
    """Which adapters go on from."""
    torch.manual_seed(0)
    model = Olmo2ForCausalLM(copy.deepcopy(CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.stack([example["input_ids"] for example in dataset()])
    for _ in range(20):
        (summed(model(input_ids=tokens).logits, tokens) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def base(folder: Path, kind: str) -> Olmo2ForCausalLM:
    """The trained one, without adapters."""
    quantized = {"quantization_config": QUANTIZED[kind]} if kind in QUANTIZED else {}
    return Olmo2ForCausalLM.from_pretrained(folder, **quantized)


def adapted(model: nn.Module, kind: str) -> nn.Module:
    torch.manual_seed(1)
    adapters = ADAPTERS[kind]
    return model if adapters is None else get_peft_model(model, copy.deepcopy(adapters))


def trained(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


class Witness(hf_worker.Witness):
    """Of what trains alone, and of more than tokens and labels."""

    def weights(self) -> dict[str, Tensor]:
        return trained(self.model)

    def keep(self, _: Any, __: Any, given: Any) -> None:
        if torch.is_grad_enabled():
            given = {name: value for name, value in given.items() if name in READ}
            self.passes.append((given, torch.get_rng_state()))


#: What a model's loss depends on.
READ = ("input_ids", "attention_mask", "position_ids", "labels")

#: Of a model, the base and the passes of a step: the mean loss, and of how many tokens or samples.
Loss = Callable[[nn.Module, nn.Module, list[Any]], tuple[Tensor, int]]


def logits_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(**{name: value for name, value in given.items() if name != "labels"}).logits


def cross_entropy(model: nn.Module, _: nn.Module, passes: list[Any]) -> tuple[Tensor, int]:
    total, tokens = torch.zeros(()), 0
    for given, random_state in passes:
        torch.set_rng_state(random_state)
        total = total + summed(logits_of(model, given), given["labels"])
        tokens += int(given["labels"][:, 1:].ne(-100).sum())
    return total / tokens, tokens


def preference(
    model: nn.Module, reference: nn.Module, passes: list[Any]
) -> tuple[Tensor, int]:
    """DPO's, of chosen and rejected completions in one batch."""
    losses = []
    for given, random_state in passes:
        labels = given["labels"][:, 1:]
        torch.set_rng_state(random_state)
        logits = [logits_of(model, given)]
        with torch.no_grad():
            logits.append(logits_of(reference, given))
        each = [
            F.cross_entropy(entry[:, :-1].transpose(1, 2), labels, reduction="none").sum(1)
            for entry in logits
        ]
        chosen, rejected = (each[1] - each[0]).chunk(2)
        losses.append(-F.logsigmoid(BETA * (chosen - rejected)).mean())
    return sum(losses) / len(losses), sum(len(given["labels"]) for given, _ in passes)


def losses_anew(
    step: dict[str, Any], record: dict[str, Any], loss_of: Loss, models: tuple[nn.Module, nn.Module]
) -> dict[str, float]:
    """L(θ), L(lower), L(upper) and ⟨g, Δθ⟩, from the definitions.

    Args:
        models: one like the trained one, and the base.
    """
    model, reference = models
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    update = {
        name: (start - step["after"][name]) / step["lr"] for name, start in step["before"].items()
    }

    def loss_at(eta: float) -> tuple[Tensor, int]:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(step["before"][name] - eta * update[name])
        return loss_of(model, reference, step["passes"])

    saved = torch.get_rng_state()
    model.zero_grad()
    loss, tokens = loss_at(0.0)
    loss.backward()
    slope = sum(float((weight.grad * update[name]).sum()) for name, weight in weights.items())
    with torch.no_grad():
        ends = {end: loss_at(record[f"critical_lr_{end}"])[0].item() for end in ("lower", "upper")}
    torch.set_rng_state(saved)
    return {"loss": loss.item(), "slope": slope, "tokens": tokens, **ends}


class Runs:
    """Trainings from the same base.

    Args:
        folder: for the base and checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "base"
        train_base(self.base)

    def __call__(
        self,
        name: str,
        trainer_class: type[Trainer],
        kind: str,
        *,
        every: int = 0,
        loss_of: Loss | None = None,
        resume: str | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """With a ``Trainer`` or one of TRL's.

        Args:
            name: of the folder with its checkpoints.
            kind: of model.
            loss_of: computes anew what was measured.
            resume: the run whose checkpoint this one goes on from.
        """
        args = {
            "output_dir": str(self.folder / name),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "max_grad_norm": 0.5,
            "logging_steps": 2,
            "report_to": "none",
            "save_steps": 2,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        } | arguments
        model = base(self.base, kind)
        torch.manual_seed(1)
        adapters = copy.deepcopy(ADAPTERS[kind])
        if trainer_class is Trainer:
            trainer = Trainer(
                adapted(model, kind), TrainingArguments(**args), train_dataset=dataset()
            )
        else:
            config, data = OF_TRAINER[trainer_class]
            trainer = trainer_class(
                model,
                args=config(**args),
                train_dataset=data(),
                processing_class=tokenizer(),
                peft_config=adapters,
            )
        seen, records = Witness(), Records()
        if loss_of:
            trainer.add_callback(seen)
        if every:
            trainer.add_callback(CriticalSharpnessCallback(trainer, every=every, sinks=[records]))
        start = str(self.folder / resume / "checkpoint-2") if resume else None
        trainer.train(resume_from_checkpoint=start)
        result = {
            "digest": digest(trainer),
            "logs": trainer.state.log_history,
            "records": [dataclasses.asdict(record) for record in records],
        }
        if loss_of:
            models = self.models(kind)
            result["anew"] = [
                losses_anew(seen.steps[record["iteration"] - 1], record, loss_of, models)
                for record in result["records"]
                if record["status"] == "found"
            ]
        return result

    def models(self, kind: str) -> tuple[nn.Module, nn.Module]:
        """One like the trained one, and the reference: TRL takes a frozen copy, or the model itself
        without its adapters, dropout and all."""
        reference = base(self.base, kind).train(kind != "all")
        return adapted(base(self.base, kind), kind).train(), reference

    def loop(
        self, kind: str, *, every: int = 0, start: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """With :class:`CriticalSharpness`; ``start`` is the state of a run to go on from."""
        model = adapted(base(self.base, kind), kind).train()
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, **options)
        records = Records()
        sharpness = CriticalSharpness(model, optimizer, every=every, sinks=[records])
        objects = {"optimizer": optimizer, "sharpness": sharpness}
        if start:
            set_peft_model_state_dict(model, start["adapters"])
            for name, held in objects.items():
                held.load_state_dict(start[name])
            torch.set_rng_state(start["random"])
        data, steps, saved = dataset(), {}, {}
        for step in range(start["step"] + 1 if start else 1, STEPS + 1):
            batch = data[8 * step : 8 * step + 8]
            ids = torch.stack([e["input_ids"] for e in batch])
            passes = [({"input_ids": ids, "labels": ids}, torch.get_rng_state())]
            evaluate = functools.partial(loss_sum_and_tokens, model, ids)
            loss, tokens = evaluate()
            (loss / tokens).backward()
            before = trained(model)
            optimizer.step()
            steps[step] = {"before": before, "lr": 1e-2, "passes": passes, "after": trained(model)}
            optimizer.zero_grad()
            sharpness.after_step(step, evaluate, loss=(loss.detach(), tokens))
            if step == 2:
                saved = {name: copy.deepcopy(o.state_dict()) for name, o in objects.items()}
                saved["adapters"] = copy.deepcopy(get_peft_model_state_dict(model))
                saved |= {"step": step, "random": torch.get_rng_state()}
        result = {
            "digest": hash_of(model.state_dict(), optimizer.state_dict(), random_states()),
            "records": [dataclasses.asdict(record) for record in records],
            "moved": sorted(
                name for name, now in steps[min(steps)]["after"].items()
                if not torch.equal(now, steps[min(steps)]["before"][name])
            ),
        }  # fmt: skip
        models = self.models(kind)
        result["anew"] = [
            losses_anew(steps[record["iteration"]], record, cross_entropy, models)
            for record in result["records"]
            if record["status"] == "found"
        ]
        if every and not start:
            result["resumed"] = self.loop(kind, every=every, start=saved, **options)
        return result


def loss_sum_and_tokens(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
    return summed(model(input_ids=ids).logits, ids), ids[:, 1:].numel()


OF_TRAINER: dict[type[Trainer], Any] = {
    SFTTrainer: (SFTConfig, completions),
    DPOTrainer: (DPOConfig, preferences),
}

PACKED = {"packing": True, "completion_only_loss": True, "max_length": 32}
DPO = {"beta": BETA, "max_length": 32}

#: Trainings, each with its trainer, kind of model, loss and arguments.
TRAININGS: dict[str, Any] = {
    "LoRA": (Trainer, "lora", cross_entropy, {}),
    "SFT": (SFTTrainer, "all", cross_entropy, PACKED),
    "SFT, padded, DoRA": (SFTTrainer, "dora", cross_entropy, {"completion_only_loss": True}),
    "DPO": (DPOTrainer, "all", preference, DPO),
    "DPO, precomputed": (DPOTrainer, "all", preference, {**DPO, "precompute_ref_log_probs": True}),
    "DPO, LoRA": (
        DPOTrainer, "lora", preference,
        {**DPO, "disable_dropout": False, "per_device_train_batch_size": 8},
    ),
}  # fmt: skip

RESUMED = ("LoRA", "SFT", "DPO, LoRA")


def factored(scale: float) -> list[tuple[float, float]]:
    """The losses and critical learning rates of BA, where A is so much larger and B smaller."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(32, 8), torch.randn(32, 8)
    model = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[1].weight.div_(scale)
    optimizer, records = torch.optim.SGD(model.parameters(), lr=1e-3), Records()

    def loss_sum_and_tokens() -> tuple[Tensor, int]:
        return F.mse_loss(model(inputs.double()), targets.double(), reduction="sum"), len(inputs)

    sharpness = CriticalSharpness(model, optimizer, every=1, sinks=[records])
    loss, tokens = loss_sum_and_tokens()
    (loss / tokens).backward()
    optimizer.step()
    sharpness.after_step(1, loss_sum_and_tokens, loss=(loss.detach(), tokens))
    return [(record.loss, record.critical_lr) for record in records]


def run_page() -> list[dict[str, Any]]:
    """The records of what docs/peft_trl.md begins with, in this folder."""
    text = (ROOT / "docs" / "peft_trl.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet is not None
    exec(snippet[1], {"__name__": "__main__"})
    return [json.loads(line) for line in Path("critical_sharpness.jsonl").read_text().splitlines()]


def main(folder: Path) -> None:
    runs = Runs(folder)
    results: dict[str, Any] = {"loop": {}, "trainers": {}}
    for kind in ("lora", "4 bits", "4 bits, bf16", "8 bits"):
        on = runs.loop(kind, every=1, weight_decay=0.0)
        results["loop"][kind] = {"off": runs.loop(kind, weight_decay=0.0), "on": on}
    for name, (trainer_class, kind, loss_of, arguments) in TRAININGS.items():
        run = functools.partial(runs, trainer_class=trainer_class, kind=kind, **arguments)
        results["trainers"][name] = {
            "off": run(f"{name} off"),
            "on": run(name, every=2, loss_of=loss_of),
        }
        if name in RESUMED:
            results["trainers"][name]["resumed"] = run(f"{name} resumed", every=2, resume=name)
    results["factored"] = [factored(1.0), factored(4.0)]
    results["page"] = run_page()
    (folder / "rank0.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
