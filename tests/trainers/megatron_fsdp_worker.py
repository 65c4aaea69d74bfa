"""Trains a small GPT with the package megatron-fsdp, without and with measurement.

Started by ``test_megatron_fsdp.py``, one process a rank:
``python -m tests.trainers.megatron_fsdp_worker FOLDER``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW, Optimizer

from megatron_sharpness.megatron.cpu import cuda, processes

processes.map_distributed()
cuda.map_cuda()

import megatron_fsdp  # noqa: E402
from megatron_fsdp import param_and_grad_buffer as buffers  # noqa: E402

from megatron_sharpness.core.errors import InputError  # noqa: E402
from megatron_sharpness.core.megatron_fsdp import read_by_forward  # noqa: E402
from megatron_sharpness.core.update_line import UpdateLine  # noqa: E402
from megatron_sharpness.pytorch import CriticalSharpness  # noqa: E402
from tests.digest import hash_of, random_states  # noqa: E402
from tests.processes import ROOT  # noqa: E402
from tests.pytorch.gpt import Block, ModularGPT, loss_sum, make_batch, make_gpt  # noqa: E402

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

LR, DECAY = 1e-2, 0.1

Made = tuple[nn.Module, Optimizer]


def make_model(dropout: float, dtype: torch.dtype) -> nn.Module:
    return make_gpt(dropout, kind=ModularGPT).to(dtype)


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=LR, weight_decay=DECAY)


def at_once(model: nn.Module, **options: Any) -> Made:
    return megatron_fsdp.fully_shard(model, adamw(model), fsdp_unit_modules=[Block], **options)


def in_two(model: nn.Module, **options: Any) -> Made:
    model = megatron_fsdp.fully_shard_model(model, fsdp_unit_modules=[Block], **options)
    return model, megatron_fsdp.fully_shard_optimizer(adamw(model))


def hybrid(model: nn.Module, **options: Any) -> Made:
    mesh = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("outer", "shard", "tensor"))
    mesh[("outer", "shard")]._flatten("both")
    names = {"dp_outer_dim": "outer", "dp_shard_dim": "shard", "tp_dim": "tensor"}
    group = mesh["both"].get_group()
    return at_once(model, device_mesh=mesh, hybrid_fsdp_group=group, **names, **options)


def fsdp2(model: nn.Module) -> Made:
    """PyTorch's, begun as megatron-fsdp begins: all parameters are stepped on gradients of 0."""
    for block in model.blocks:
        dist.fsdp.fully_shard(block)
    dist.fsdp.fully_shard(model)
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def clip(parameters: list[Any], limit: float) -> float:
    """PyTorch's own waits for ever where a rank holds nothing of some parameter."""
    gradients = [p.grad.to_local() for p in parameters if p.grad is not None]
    total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    dist.all_reduce(total)
    norm = total.sqrt().item()
    for gradient in gradients:
        gradient.mul_(min(1.0, limit / norm))
    return norm


def train(
    make: Callable[..., Made],
    every: int = 2,
    *,
    dropout: float = 0.2,
    dtype: torch.dtype = torch.float32,
    steps: int = 6,
    micro_batches: int = 1,
    limit: float = 0.0,
    validate: bool = False,
    installed: bool = True,
    measured: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A few steps, measured where ``every`` is not 0; what is left of them on this rank.

    Args:
        limit: of the gradient's norm.
        validate: whether the loop evaluates another loss between step and measurement.
        installed: whether passes see the weights that megatron-fsdp's own first step has decayed.
        measured: options of CriticalSharpness.
        options: of megatron-fsdp.
    """
    torch.manual_seed(0)
    model, optimizer = make(make_model(dropout, dtype), **options)
    of_package = isinstance(model, megatron_fsdp.MegatronFSDP)
    if of_package and installed:
        model.install_optimized_model_weights()
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(100 + rank)
    sharpness = None
    if every:
        sharpness = CriticalSharpness(model, optimizer, every, watch="always", **(measured or {}))
    losses: list[Tensor] = []
    records = []
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        batches = [make_batch(step, i, rank) for i in range(micro_batches)]
        total = sum(
            int(make_batch(step, i, other)[1].ge(0).sum())
            for i in range(micro_batches)
            for other in range(size)
        )

        def evaluate() -> tuple[Tensor, int]:
            pairs = [loss_sum(model, batch) for batch in batches]  # noqa: B023
            return torch.stack([loss for loss, _ in pairs]).sum(), sum(int(n) for _, n in pairs)

        summed, tokens = torch.zeros(()), 0
        for i, batch in enumerate(batches):
            if of_package:
                model.set_model_auto_sync(i == micro_batches - 1)
            loss, count = loss_sum(model, batch)
            (loss * size / total).backward()
            summed, tokens = summed + loss.detach(), tokens + int(count)
        norm = clip(stepped, limit) if limit else None
        optimizer.step()
        losses.append(summed)
        if validate:
            with torch.no_grad():
                losses.append(loss_sum(model, make_batch(99, 0, rank))[0])
        if sharpness is not None:
            record = sharpness.after_step(step, evaluate, loss=(summed, tokens), grad_norm=norm)
            records += [dataclasses.asdict(record)] if record is not None else []
        optimizer.zero_grad()
    return {
        "training": {
            "parameters": hash_of(stepped),
            "read by passes": hash_of(map(read_by_forward, stepped)) if of_package else None,
            "buffers": hash_of(model.buffers()),
            "optimizer": hash_of(
                value for state in optimizer.state.values() for _, value in sorted(state.items())
            ),
            "random": random_states(),
            "losses": hash_of(losses),
        },
        "records": records,
    }


def without_and_with(make: Callable[..., Made], **options: Any) -> dict[str, Any]:
    return {"off": train(make, 0, **options), "on": train(make, **options)}


def in_flight() -> list[int]:
    """How many gathers are under way whenever a measurement writes weights."""
    found: list[int] = []
    move = UpdateLine.move

    def make(model: nn.Module) -> Made:
        sharded, optimizer = at_once(model, zero_dp_strategy="optim")

        def watched_move(self: UpdateLine, *where: Any) -> None:
            found.append(len(sharded.all_gather_pipeline.param_gather_event_map))
            move(self, *where)

        UpdateLine.move = watched_move
        return sharded, optimizer

    try:
        train(make, steps=1)
    finally:
        UpdateLine.move = move
    return found


def refusals() -> list[str]:
    reasons = []
    for options in (
        {"use_decoupled_grad": True},
        {"overlap_param_gather": False, "zero_dp_strategy": 2},
    ):
        try:
            train(in_two, **options)
        except InputError as error:
            reasons.append(str(error))
    return reasons


def run_page() -> None:
    """The loop that docs/megatron_fsdp.md begins with; it ends the process group."""
    text = (ROOT / "docs" / "megatron_fsdp.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet is not None
    exec(snippet[1], {"__name__": "__main__"})


def sum_without_nccl() -> None:
    """A sum that is multiplied before is NCCL's only."""
    prepare = buffers.gradient_reduce_preprocessing

    def prepare_for_gloo(gradient: Tensor, factor: float, config: Any) -> Any:
        config.gradient_reduce_div_fusion = False
        return prepare(gradient, factor, config)

    buffers.gradient_reduce_preprocessing = prepare_for_gloo


def main(folder: Path) -> None:
    sum_without_nccl()
    dist.init_process_group()
    rank = dist.get_rank()
    results: dict[str, Any] = {"fsdp2": train(fsdp2, dropout=0.0)}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        for strategy in range(4):
            way: dict[str, Any] = {"zero_dp_strategy": strategy, "dtype": dtype}
            results[f"{name} {strategy}"] = {
                **without_and_with(at_once, **way),
                "number": train(at_once, dropout=0.0, **way),
            }
    accumulated: dict[str, Any] = {"micro_batches": 2, "limit": 0.5}
    results |= {
        "accumulated": without_and_with(in_two, **accumulated),
        "accumulated, optim": without_and_with(in_two, zero_dp_strategy="optim", **accumulated),
        "hybrid": without_and_with(hybrid),
        "one precision": without_and_with(
            at_once,
            mixed_precision_policy=megatron_fsdp.MixedPrecisionPolicy(main_params_dtype=None),
        ),
        "validated": without_and_with(at_once, validate=True),
        "offload": without_and_with(at_once, measured={"offload": "cpu"}),
        "frozen": {
            "begin": train(at_once, 0, steps=0, dtype=torch.bfloat16),
            "end": train(at_once, measured={"frozen": 0}, dtype=torch.bfloat16),
        },
        "decayed": without_and_with(at_once, installed=False),
        "in flight": in_flight(),
        "refusals": refusals(),
    }
    run_page()
    if rank == 0:
        lines = Path("runs", "loop", "critical_sharpness.jsonl").read_text().splitlines()
        results["page"] = [json.loads(line) for line in lines]
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
