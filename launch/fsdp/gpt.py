"""A plain GPT, with the options that Megatron's flags name and its initialization."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [sequence, head]


@dataclass(frozen=True)
class GPTConfig:
    """What Megatron's flags of these names mean; ``ffn_hidden_size`` has Megatron's default."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    vocab_size: int = 257
    ffn_hidden_size: int | None = None
    position_embedding_type: str = "learned_absolute"
    rotary_base: float = 10000.0
    normalization: str = "LayerNorm"
    norm_epsilon: float = 1e-5
    swiglu: bool = False
    disable_bias_linear: bool = False
    untie_embeddings_and_output_weights: bool = False
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1
    init_method_std: float = 0.02

    def norm(self) -> nn.Module:
        """A normalization of the hidden states."""
        kind = nn.RMSNorm if self.normalization == "RMSNorm" else nn.LayerNorm
        return kind(self.hidden_size, eps=self.norm_epsilon)

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        """A linear layer inside of a block."""
        return nn.Linear(inputs, outputs, bias=not self.disable_bias_linear)

    def hidden_of_mlp(self) -> int:
        """The width inside of the MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return int(4 * self.hidden_size * 2 / 3 / 64) * 64 if self.swiglu else 4 * self.hidden_size


class Block(nn.Module):
    """Causal self-attention and an MLP, each normalized before and added to the residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.hidden_of_mlp()
        self.config = config
        self.norm1, self.norm2 = config.norm(), config.norm()
        self.qkv, self.proj = config.linear(width, 3 * width), config.linear(width, width)
        self.up = config.linear(width, 2 * hidden if config.swiglu else hidden)
        self.down = config.linear(hidden, width)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        x = x + self.dropout(self._attention(self.norm1(x), rotation))
        x = x + self.dropout(self._mlp(self.norm2(x)))
        return x

    def _attention(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.config.num_attention_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [batch, head, sequence, channel]
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        dropout = self.config.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return projected

    def _mlp(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.config.swiglu:
            gate, y = y.chunk(2, dim=-1)
            y = F.silu(gate) * y
        else:
            y = F.gelu(y, approximate="tanh")
        projected: Tensor = self.down(y)
        return projected


class GPT(nn.Module):
    """Tokens in, logits out: [batch, sequence] → [batch, sequence, vocabulary]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned_absolute":
            self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = config.norm()
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not config.untie_embeddings_and_output_weights:
            self.head.weight = self.embedding.weight
        self._initialize()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        rotation = None
        if self.config.position_embedding_type == "rope":
            rotation = self._rotation(tokens.shape[1], x)
        else:
            x = x + self.position.weight[: tokens.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _rotation(self, length: int, like: Tensor) -> Rotation:
        size = self.config.hidden_size // self.config.num_attention_heads
        channels = torch.arange(0, size, 2, dtype=torch.float32, device=like.device)
        positions = torch.arange(length, dtype=torch.float32, device=like.device)
        angles = torch.outer(positions, self.config.rotary_base ** -(channels / size))
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def _initialize(self) -> None:
        std = self.config.init_method_std
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):  # what is added to the residual
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.num_layers))
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position embedding: turns the pairs (channel i, channel i + half)."""
    cosines, sines = rotation
    left, right = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-right, left], dim=-1) * sines
