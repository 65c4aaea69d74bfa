"""Loss landscapes along the update of small byte-level GPTs, as they are trained.

A run is a four-layer GPT on the Python language reference (`pydoc_data.topics`, part of every
Python), AdamW, warmup-stable-decay. `landscapes` yields one `Landscape` a step: the line
L(θ - ηΔθ) on the step's own batch, with Δθ the real update (weight decay in it) and the slope
s = ⟨g, Δθ⟩ of the unclipped gradient.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Setting:
    """One training run."""

    peak_lr: float
    width: int = 64
    layers: int = 4
    heads: int = 4
    sequence: int = 64
    batch: int = 16
    steps: int = 400
    warmup: int = 40
    decay: int = 100
    weight_decay: float = 0.1
    seed: int = 0

    def lr(self, step: int) -> float:
        """Learning rate of a step (the first is 0): linear warmup, constant, linear decay."""
        rise = (step + 1) / self.warmup
        fall = (self.steps - step) / self.decay
        return self.peak_lr * min(1.0, rise, fall)


@dataclass(frozen=True)
class Landscape:
    """The line θ - ηΔθ at one step.

    `loss_at` is one forward pass over the step's sequences. It is valid during the step.
    """

    step: int
    lr: float
    loss: float
    slope: float
    loss_at: Callable[[float], float]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, sequence, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, sequence, width))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + hidden


class ByteGPT(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, setting.width)
        self.positions = nn.Embedding(setting.sequence, setting.width)
        self.blocks = nn.Sequential(
            *(Block(setting.width, setting.heads) for _ in range(setting.layers))
        )
        self.norm = nn.LayerNorm(setting.width)
        self.head = nn.Linear(setting.width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * setting.layers) ** deep))

    def forward(self, text: Tensor) -> Tensor:
        """Mean cross-entropy (nat) of each next byte; text is [batch, sequence + 1] of bytes."""
        inputs, targets = text[:, :-1], text[:, 1:]
        x = self.tokens(inputs) + self.positions.weight
        logits = self.head(self.norm(self.blocks(x)))
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss


def landscapes(setting: Setting) -> Iterator[Landscape]:
    """Train, and yield the landscape of every step before the step is kept."""
    corpus = "\n".join(pydoc_data.topics.topics.values()).encode()
    data = torch.frombuffer(bytearray(corpus), dtype=torch.uint8).long()
    torch.manual_seed(setting.seed)
    model = ByteGPT(setting)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=setting.peak_lr, betas=(0.9, 0.95), weight_decay=setting.weight_decay
    )
    for step in range(setting.steps):
        starts = torch.randint(len(data) - setting.sequence - 1, (setting.batch, 1))
        text = data[starts + torch.arange(setting.sequence + 1)]
        lr = setting.lr(step)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = model(text)
        loss.backward()
        gradient = [parameter.grad.clone() for parameter in parameters]  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        after = [parameter.detach().clone() for parameter in parameters]
        update = [(old - new) / lr for old, new in zip(before, after, strict=True)]
        slope = sum(
            torch.dot(g.double().flatten(), d.double().flatten()).item()
            for g, d in zip(gradient, update, strict=True)
        )

        @torch.no_grad()
        def loss_at(
            eta: float,
            before: list[Tensor] = before,
            update: list[Tensor] = update,
            text: Tensor = text,
        ) -> float:
            for parameter, origin, direction in zip(parameters, before, update, strict=True):
                parameter.copy_(origin - eta * direction)
            return float(model(text))

        yield Landscape(step, lr, loss.item(), slope, loss_at)
        with torch.no_grad():
            for parameter, new in zip(parameters, after, strict=True):
                parameter.copy_(new)
