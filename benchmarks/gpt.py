"""A training of the GPT of ``launch/`` in plain PyTorch or FSDP2, to time."""

from __future__ import annotations

import os
import pydoc_data.topics
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from benchmarks.results import ROOT

sys.path.insert(0, str(ROOT / "launch"))
from fsdp.gpt import GPT, GPTConfig

DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(DEVICE)


@dataclass(frozen=True)
class Size:
    """A model, and the micro-batches of a step on each rank."""

    layers: int = 4
    width: int = 512
    sequence: int = 256
    batch: int = 2
    micro_batches: int = 2


class Training:
    """AdamW on the Python documentation, byte by byte.

    Args:
        size: of the model and of a step.
        lr: learning rate.
        sharded: under FSDP2 over all ranks, computing in bf16; else on this process, in fp32.
    """

    def __init__(self, size: Size, *, lr: float = 1e-3, sharded: bool = False) -> None:
        torch.manual_seed(0)
        config = GPTConfig(
            num_layers=size.layers,
            hidden_size=size.width,
            num_attention_heads=max(1, size.width // 64),
            max_position_embeddings=size.sequence,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
        self.size = size
        self.model = GPT(config).to(DEVICE)
        if sharded:
            options = {
                "mesh": init_device_mesh(DEVICE.type, (dist.get_world_size(),)),
                "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32),
            }
            for block in self.model.blocks:
                fully_shard(block, **options)  # type: ignore[arg-type]
            fully_shard(self.model, **options)  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1
        )
        corpus = "\n".join(pydoc_data.topics.topics.values()).encode()
        self._data = torch.frombuffer(bytearray(corpus), dtype=torch.uint8).long()
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.generator = torch.Generator().manual_seed(rank)
        self.batches: list[Tensor] = []
        #: Sum of losses and tokens of the step, as :meth:`backward` has computed them.
        self.trained: tuple[Tensor, int] = (torch.zeros(()), 0)

    def step(self) -> None:
        """One optimizer step on the next micro-batches."""
        self.backward()
        self.optimizer.step()

    def backward(self) -> None:
        """The gradients of the next micro-batches."""
        self.optimizer.zero_grad()
        size = self.size
        starts = torch.randint(
            len(self._data) - size.sequence - 1,
            (size.micro_batches, size.batch, 1),
            generator=self.generator,
        )
        text = self._data[starts + torch.arange(size.sequence + 1)]
        self.batches = list(text.to(DEVICE))
        losses = []
        for batch in self.batches:
            loss = self._loss(batch)
            (loss / size.micro_batches).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        tokens = size.micro_batches * size.batch * size.sequence
        self.trained = torch.stack(losses).mean() * tokens, tokens

    def evaluate(self) -> tuple[Tensor, int]:
        """The sum of losses over the step's micro-batches, forward only, and their tokens."""
        with torch.no_grad():
            losses = [self._loss(batch) * (batch.numel() - len(batch)) for batch in self.batches]
        return torch.stack(losses).sum(), sum(b.numel() - len(b) for b in self.batches)

    @property
    def mean_loss(self) -> float:
        """The loss over the step's micro-batches, in nat a token, as the weights are now."""
        total, tokens = self.evaluate()
        return float(total) / tokens

    def mean_loss_with_graph(self) -> Tensor:
        """The same, of micro-batches of one size, to differentiate."""
        return torch.stack([self._loss(batch) for batch in self.batches]).mean()

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self.model(batch[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
