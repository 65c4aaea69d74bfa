"""Does the data mix that relative critical sharpness recommends hold in training (Fig. 6)?"""

from __future__ import annotations

import copy
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments import training
from experiments.gpt_wsd.run import loss, tokens_of, windows
from megatron_sharpness.adaptive_mix.controller import MixController
from megatron_sharpness.core.measurement import relative_sharpness
from megatron_sharpness.data.tokenize import VOCAB_SIZE, python_code, python_prose
from megatron_sharpness.pytorch import CriticalSharpness

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

from fsdp.gpt import GPT, GPTConfig

#: Shares of the first domain: those that are measured, and those that are trained with too.
SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TRAINED = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
RATES = tuple(float(f"{rate:.3g}") for rate in np.geomspace(1e-4, 3e-2, 9))
#: Steps after which the change of the held-out losses is noted.
NOTED = (1, 10, 100)
ADJUST_EVERY, MEASURE_EVERY = 3, 5


@dataclass(frozen=True)
class Setting:
    """What is trained on, and how large.

    Attributes:
        first, second: the domains, ``prose`` or ``code`` of Python's own, or a file of text or of
            JSON lines with question and answer.
        base_share: of the first domain, in the training of the base model.
    """

    first: str = "prose"
    second: str = "code"
    base_share: float = 0.8
    layers: int = 4
    width: int = 64
    heads: int = 4
    length: int = 64
    sequences: int = 16
    held_out: int = 64
    base_steps: int = 1200
    base_lr: float = 5e-3
    accumulate: int = 50
    measure: int = 30
    steps: int = 300
    device: str = "cpu"


#: As the paper's models: for a GPU, and not run yet.
LARGE = Setting(
    layers=12, width=768, heads=12, length=512, sequences=64, held_out=256, base_steps=20_000,
    base_lr=1e-3, accumulate=100, measure=100, steps=2000, device="cuda",
)  # fmt: skip


@functools.cache
def text(source: str) -> tuple[Tensor, Tensor]:
    """A domain as bytes: what is trained on, and the last tenth, which is held out."""
    documents: list[bytes]
    if source in ("prose", "code"):
        documents = list(python_prose() if source == "prose" else python_code())
        if source == "code":
            documents = [document[:20_000] for document in documents[:150]]
    elif source.endswith(".jsonl"):
        lines = [json.loads(line) for line in Path(source).read_text().splitlines()]
        documents = [f"{line['question']}\n{line['answer']}".encode() for line in lines]
    else:
        documents = [Path(source).read_bytes()]
    ids = tokens_of(documents)
    part = len(ids) * 9 // 10
    return ids[:part], ids[part:]


def batch_at(setting: Setting, share: float, step: int) -> Tensor:
    """A step's tokens, [sequences, length + 1]: each sequence of the first domain by chance."""
    generator = torch.Generator().manual_seed(100_000 + step)
    is_first = torch.rand(setting.sequences, 1, generator=generator) < share
    first, second = (
        windows(text(source)[0], setting.sequences, setting.length, 2 * step + i)
        for i, source in enumerate((setting.first, setting.second))
    )
    return torch.where(is_first, first, second).to(setting.device)


def held_out(setting: Setting) -> dict[str, Tensor]:
    return {
        name: windows(text(source)[1], setting.held_out, setting.length, 7).to(setting.device)
        for name, source in (("first", setting.first), ("second", setting.second))
    }


def new_model(setting: Setting) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            num_layers=setting.layers, hidden_size=setting.width, vocab_size=VOCAB_SIZE,
            num_attention_heads=setting.heads, max_position_embeddings=setting.length,
            position_embedding_type="rope", attention_dropout=0.0, hidden_dropout=0.0,
        )
    ).to(setting.device)  # fmt: skip


def optimizer_of(network: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


class Run:
    """Training of the base model, or on from it; what the losses are, and λ_c^{1→2}."""

    def __init__(self, setting: Setting, base: Path | None, lr: float, **options: Any) -> None:
        self.setting = setting
        self.model = new_model(setting)
        if base is not None:
            self.model.load_state_dict(torch.load(base, map_location=setting.device))
        self.optimizer = optimizer_of(self.model, lr)
        self.data = held_out(setting)
        self.sharpness = CriticalSharpness(
            self.model,
            self.optimizer,
            losses={
                name: functools.partial(self._held_out, tokens)
                for name, tokens in self.data.items()
            },
            **options,
        )

    def step(self, number: int, share: float, draw: int = 0) -> dict[str, float]:
        """One step; λ by task where it was measured, ∞ where the loss rises at once."""
        batch = batch_at(self.setting, share, number + draw)
        self.optimizer.zero_grad()
        loss(self.model, batch).backward()
        self.optimizer.step()
        if self.sharpness.after_step(number, lambda: (loss(self.model, batch), 1)) is None:
            return {}
        found = {
            name: relative_sharpness(
                record.status, record.critical_sharpness, record.critical_lr_lower
            )
            for name, record in self.sharpness.records.items()
        }
        return {name: value for name, value in found.items() if value is not None}

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        return {name: loss(self.model, tokens).item() for name, tokens in self.data.items()}

    def _held_out(self, tokens: Tensor) -> tuple[Tensor, int]:
        return loss(self.model, tokens), 1


def pretrain(setting: Setting, path: Path) -> list[training.Row]:
    """The base model, on the mix of :attr:`Setting.base_share`, with a linear decay to a tenth; its
    losses on the way."""
    run = Run(setting, None, setting.base_lr, every=0)
    rows = []
    for step in range(1, setting.base_steps + 1):
        done = step / setting.base_steps
        for group in run.optimizer.param_groups:
            group["lr"] = setting.base_lr * min(step / 100, 1.0 - 0.9 * done)
        run.step(step, setting.base_share, draw=1_000_000)
        if step % 200 == 0:
            rows.append({"steps": step, "share": setting.base_share, **run.losses()})
            training.progress(f"base model: step {step} of {setting.base_steps}, {run.losses()}")
    torch.save(run.model.state_dict(), path)
    return rows


def sweep(setting: Setting, base: Path, share: float) -> list[training.Row]:
    """λ_c^{1→2} of both tasks at a share, a row a measured batch."""
    run = Run(setting, base, 1e-3, every=1, frozen=setting.accumulate)
    rows = []
    for step in range(1, setting.accumulate + setting.measure + 1):
        if measured := run.step(step, share):
            rows.append({"share": share, "batch_number": step, **_as_json(measured)})
    return rows


def grid(setting: Setting, base: Path, share: float) -> list[training.Row]:
    """Training on from the base at a share, a row for each learning rate and number of steps.

    Adam's moments are those of the mix before the first step, as in the sweep.
    """
    warm = Run(setting, base, 1e-3, every=0, frozen=setting.accumulate)
    for step in range(1, setting.accumulate + 1):
        warm.step(step, share)
    moments = warm.optimizer.state_dict()
    before = warm.losses()
    rows = []
    for lr in RATES:
        run = Run(setting, base, lr, every=0)
        state = copy.deepcopy(moments)
        for group in state["param_groups"]:
            group["lr"] = lr
        run.optimizer.load_state_dict(state)
        for step in range(1, max(NOTED) + 1):
            run.step(step, share, draw=setting.accumulate)
            if step in NOTED:
                after = run.losses()
                change = {f"change_{name}": after[name] - before[name] for name in after}
                rows.append({"share": share, "lr": lr, "steps": step, **_as_json(change)})
    return rows


def train_on(
    setting: Setting, base: Path, share: float, lr: float, adaptive: bool
) -> list[training.Row]:
    """Training on at a fixed share, or at one that a controller adjusts, with λ_c^{1→2} then; a row
    every few steps."""
    controller = MixController(
        share, gains="first", loses="second", every=ADJUST_EVERY, lower=0.0, upper=1.0
    )
    run = Run(setting, base, lr, every=MEASURE_EVERY if adaptive else 0)
    rows = [{"steps": 0, "share": share, **run.losses()}]
    for step in range(1, setting.steps + 1):
        measured = run.step(step, controller.share)
        if measured:
            controller.observe(measured)
        if step % MEASURE_EVERY == 0:
            seen = {f"sharpness_{name}": value for name, value in measured.items()}
            rows.append(
                {"steps": step, "share": controller.share, **run.losses(), **_as_json(seen)}
            )
    return rows


def _as_json(values: dict[str, float]) -> dict[str, Any]:
    """∞ as the text that ``float`` reads."""
    return {k: "inf" if value == math.inf else value for k, value in values.items()}
