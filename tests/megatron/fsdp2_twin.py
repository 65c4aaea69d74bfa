"""One rank of FSDP2 on the weights and the batch of a Megatron run, for one step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.sinks import JsonLinesSink
from tests.megatron import reference


class Twin(nn.Module):
    """The GPT of :mod:`tests.megatron.reference` in fp32, as a module."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in reference.parameters().items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(value.float()))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        weights = {name.replace("/", "."): value for name, value in self.named_parameters()}
        return reference.loss(weights, batch)


def main(folder: Path, batches: Path) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = fully_shard(Twin())
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith(".bias")]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or n.endswith(".bias")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=reference.LR, betas=(reference.BETA1, reference.BETA2), eps=reference.EPSILON,
        weight_decay=reference.WEIGHT_DECAY,
    )  # fmt: skip
    sharpness = CriticalSharpness(model, optimizer, 1, [JsonLinesSink(folder / "fsdp2.jsonl")])
    mine: list[dict[str, Any]] = torch.load(batches, weights_only=False)[rank::size]

    def evaluate() -> tuple[Tensor, Tensor]:
        tokens = torch.stack([batch["loss_mask"].sum() for batch in mine])
        losses = torch.stack([model(batch) for batch in mine])
        return torch.sum(losses * tokens), tokens.sum()

    for batch in mine:
        (model(batch) / len(mine)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), reference.CLIP)
    optimizer.step()
    sharpness.after_step(1, evaluate, grad_norm=norm)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
