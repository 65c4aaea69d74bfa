"""A byte-level GPT with AdamW under two schedules and three learning rates (Fig. 1, 4, 7, 8)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import training
from megatron_sharpness.data.tokenize import END_OF_DOCUMENT, VOCAB_SIZE, python_prose
from megatron_sharpness.pytorch import CriticalSharpness

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

from fsdp.gpt import GPT, GPTConfig

RATES = (2e-3, 5e-3, 1.2e-2)
SCHEDULES = ("wsd", "constant")
WARMUP, DECAY, STEPS = 50, 120, 400
#: Of its peak, at the end of the decay.
LAST_RATE = 0.05
EVERY, EXACT_EVERY = 5, 50
SEQUENCES, LENGTH = 16, 64
WEIGHT_DECAY = 0.1


def learning_rate(schedule: str, peak: float, step: int) -> float:
    """Linear warm-up, and then constant, or constant and linear decay (WSD)."""
    rate = peak * min(1.0, step / WARMUP)
    if schedule == "wsd" and step > STEPS - DECAY:
        done = (step - (STEPS - DECAY)) / DECAY
        rate = peak * (1.0 - done * (1.0 - LAST_RATE))
    return rate


def tokens_of(documents: Iterable[bytes]) -> Tensor:
    """Bytes in a row, with the end of each document."""
    return torch.from_numpy(
        np.concatenate(
            [
                np.append(np.frombuffer(document, np.uint8).astype(np.int64), END_OF_DOCUMENT)
                for document in documents
            ]
        )
    )


def windows(ids: Tensor, sequences: int, length: int, seed: int) -> Tensor:
    """Pieces of a text from random places, [sequences, length + 1]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length - 1, (sequences,), generator=generator)
    return torch.stack([ids[start : start + length + 1] for start in starts.tolist()])


@functools.cache
def text() -> Tensor:
    """Python's language reference."""
    return tokens_of(python_prose())


def texts(held_out: float) -> Sequence[Tensor]:
    """The text without its last part, of this share, and that part."""
    return text().tensor_split([int(len(text()) * (1.0 - held_out))])


def batch_at(step: int, sequences: int = SEQUENCES) -> Tensor:
    """Tokens of a step, the same in every run."""
    return windows(text(), sequences, LENGTH, step)


def model(layers: int = 4, width: int = 64, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(
        GPTConfig(
            num_layers=layers, hidden_size=width, num_attention_heads=width // 16,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=LENGTH, position_embedding_type="rope",
            attention_dropout=0.0, hidden_dropout=0.0,
        )
    )  # fmt: skip


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        network.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )


def optimizers_of(name: str, network: nn.Module) -> list[torch.optim.Optimizer]:
    """By name: AdamW, SGD with momentum, or Muon for matrices of blocks and AdamW for the rest."""
    everything = dict(network.named_parameters())
    if name == "sgd":
        return [torch.optim.SGD(everything.values(), lr=1.0, momentum=0.9)]
    matrices = {key: p for key, p in everything.items() if "blocks" in key and p.dim() == 2}
    if name == "adamw":
        return [optimizer_of(network)]
    rest = [p for key, p in everything.items() if key not in matrices]
    return [
        torch.optim.Muon(
            matrices.values(), lr=1.0, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY),
    ]


def loss(network: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy a token, in nats."""
    logits = network(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def steps_of(
    network: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    sharpness: CriticalSharpness,
    *,
    steps: int,
    tokens_at: Callable[[int], Any],
    lr_at: Callable[[int], float],
    mean_loss: Callable[[nn.Module, Any], Tensor] = loss,
) -> Iterator[tuple[int, float, float]]:
    """Train, and measure what is due: each step with its loss and its gradient norm, once
    ``sharpness.records`` are of it. It ends where the loss is not finite."""
    for step in range(1, steps + 1):
        tokens = tokens_at(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step)
        value = mean_loss(network, tokens)
        if not torch.isfinite(value):
            return
        value.backward()
        norm = nn.utils.get_total_norm(p.grad for p in network.parameters() if p.grad is not None)
        for optimizer in optimizers:
            optimizer.step()
        sharpness.after_step(
            step, lambda t=tokens: (mean_loss(network, t), 1), loss=(value.detach(), 1)
        )
        yield step, value.item(), norm.item()


def run(schedule: str, peak: float, exact_every: int = EXACT_EVERY) -> list[training.Row]:
    """One of the runs."""
    network = model()
    return training.train(
        network, optimizer_of(network), loss, batch_at, steps=STEPS, every=EVERY,
        exact_every=exact_every, lr_at=lambda step: learning_rate(schedule, peak, step),
        hessian=False,
    )  # fmt: skip
