"""A small GPT with what makes a replay go wrong: dropout, tied weights, a buffer that forward
passes change and read, a frozen parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 61, 32, 4, 2, 16
IGNORED = -100


class Block(nn.Module):
    def __init__(self, dropout: float, checkpointed: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self._forward, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            linear(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Byte-like tokens in, logits out, [batch, length] → [batch, length, vocabulary]."""

    passes: Tensor

    def __init__(self, dropout: float, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.position.weight.requires_grad_(False)
        self.blocks = nn.ModuleList(Block(dropout, checkpointed) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        # Added, not multiplied: torch.compile (2.13) takes the gradient at the changed buffer.
        x = x + 0.1 * self.passes * self.position.weight[0]
        if self.training:
            self.passes += 1.0
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class ModularGPT(GPT):
    """The same with its positions read by their own module, for what waits for the parameters of
    the modules that are called; in any precision, whatever its buffer's."""

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position(torch.arange(tokens.shape[1]))
        x = self.embedding(tokens) + positions + (0.1 * self.passes * positions[0]).to(positions)
        if self.training:
            self.passes += 1.0
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def make_gpt(dropout: float, *, checkpointed: bool = False, kind: type[GPT] = GPT) -> GPT:
    torch.manual_seed(0)
    model = kind(dropout, checkpointed=checkpointed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def make_batch(step: int, micro_batch: int, data_rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets; how many targets count differs between ranks and micro-batches.

    Eight sequences: on fewer the loss crosses L(θ) several times along an early update.
    """
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_batch + data_rank)
    text = torch.randint(VOCABULARY, (8, LENGTH + 1), generator=generator)
    tokens, targets = text[:, :-1], (text[:, :-1] * 7 + 3) % VOCABULARY
    targets[:, : 1 + 2 * data_rank + micro_batch] = IGNORED
    return tokens, targets


def loss_sum(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies in nats, and the number of targets."""
    tokens, targets = batch
    logits = model(tokens)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, (targets != IGNORED).sum()
