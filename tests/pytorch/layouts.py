"""Every way of training that is claimed to be measured, by name."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from .gpt import GPT

#: Where the layouts train: the CPU over gloo, or one GPU over NCCL.
DEVICE = os.environ.get("LAYOUT_DEVICE", "cpu")
COMPILER = "inductor" if DEVICE == "cuda" else "aot_eager"  # which needs no C++ compiler


@dataclass(frozen=True)
class Wrapped:
    """A model as the loop calls it, and which data this rank trains on.

    Attributes:
        repeats: whether this rank computes the same loss as another one.
    """

    model: nn.Module
    data_rank: int
    data_size: int
    repeats: bool = False


def on_all_ranks(model: nn.Module) -> Wrapped:
    """Data parallel over all ranks."""
    return Wrapped(model, dist.get_rank(), dist.get_world_size())


def plain(model: GPT) -> Wrapped:
    return Wrapped(model, 0, 1)


def ddp(model: GPT) -> Wrapped:
    return on_all_ranks(DistributedDataParallel(model))


def fsdp1_no_shard(model: GPT) -> Wrapped:
    return on_all_ranks(
        FullyShardedDataParallel(
            model,
            sharding_strategy=ShardingStrategy.NO_SHARD,
            use_orig_params=True,
            device_id=torch.device(DEVICE),
        )
    )


def fsdp2(**options: Any) -> Callable[[GPT], Wrapped]:
    def wrap(model: GPT) -> Wrapped:
        for block in model.blocks:
            fully_shard(block, **options)
        return on_all_ranks(fully_shard(model, **options))

    return wrap


def fsdp2_before_torch_2_13(model: GPT) -> Wrapped:
    """Where FSDP2 cannot yet forget a pass. It cannot be given back: the last of all layouts."""
    if hasattr(FSDPModule, "reset_iter_state"):
        del FSDPModule.reset_iter_state
    return fsdp2(reshard_after_forward=False)(model)


def hsdp(model: GPT) -> Wrapped:
    size = min(2, dist.get_world_size())
    mesh = init_device_mesh(
        DEVICE, (size, dist.get_world_size() // size), mesh_dim_names=("replicate", "shard")
    )
    return fsdp2(mesh=mesh)(model)


def _tensor_parallel(model: GPT, mesh: Any) -> None:
    """Tensor and sequence parallelism inside of the blocks."""
    whole, sequence = Replicate(), Shard(1)
    columns = ColwiseParallel(input_layouts=sequence)
    rows = RowwiseParallel(output_layouts=sequence)
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "norm1": SequenceParallel(),
                "query": columns,
                "key": columns,
                "value": columns,
                "out": rows,
                "norm2": SequenceParallel(),
                "up": columns,
                "down": rows,
            },
        )
        parallelize_module(
            block,
            mesh,
            PrepareModuleInputOutput(
                input_layouts=whole,
                desired_input_layouts=sequence,
                use_local_input=True,
                output_layouts=sequence,
                desired_output_layouts=whole,
            ),
        )


def tensor_parallel(model: GPT) -> Wrapped:
    _tensor_parallel(model, init_device_mesh(DEVICE, (dist.get_world_size(),)))
    return Wrapped(model, 0, 1, repeats=dist.get_rank() > 0)


def fsdp2_with_tensor_parallel(model: GPT) -> Wrapped:
    size = max(1, dist.get_world_size() // 2)
    mesh = init_device_mesh(
        DEVICE, (size, dist.get_world_size() // size), mesh_dim_names=("dp", "tp")
    )
    _tensor_parallel(model, mesh["tp"])
    called = fsdp2(mesh=mesh["dp"])(model).model
    return Wrapped(called, mesh.get_local_rank("dp"), size, mesh.get_local_rank("tp") > 0)


def compiled(wrap: Callable[[GPT], Wrapped]) -> Callable[[GPT], Wrapped]:
    def wrap_and_compile(model: GPT) -> Wrapped:
        wrapped = wrap(model)
        called = torch.compile(wrapped.model, backend=COMPILER)
        return dataclasses.replace(wrapped, model=called)

    return wrap_and_compile


Optimizers = Callable[[nn.Module], list[Optimizer]]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(**options: Any) -> Optimizers:
    return lambda model: [AdamW(trained(model), lr=1e-2, weight_decay=0.1, **options)]


def groups(model: nn.Module) -> list[Optimizer]:
    """Own learning rates, no decay of vectors, and the frozen parameter left in."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [
        AdamW(
            [{"params": vectors, "weight_decay": 0.0, "lr": 3e-3}, {"params": matrices}],
            lr=1e-2,
            betas=(0.8, 0.95),
        )
    ]


def sgd(model: nn.Module) -> list[Optimizer]:
    return [SGD(trained(model), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)]


def adafactor(model: nn.Module) -> list[Optimizer]:
    return [Adafactor(trained(model), lr=1e-2)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices = [p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2]
    held = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in trained(model) if id(parameter) not in held]
    return [Muon(matrices, lr=2e-2), AdamW(rest, lr=1e-2)]


def in_backward(model: nn.Module) -> list[Optimizer]:
    """One optimizer a parameter, stepped as soon as its gradient is there."""
    optimizers: list[Optimizer] = []

    def stepping(optimizer: Optimizer) -> Callable[[Tensor], None]:
        def step(_: Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()

        return step

    for parameter in trained(model):
        optimizer = AdamW([parameter], lr=1e-2)
        parameter.register_post_accumulate_grad_hook(stepping(optimizer))
        optimizers.append(optimizer)
    return optimizers


def zero(model: nn.Module) -> list[Optimizer]:
    return [ZeroRedundancyOptimizer(trained(model), AdamW, lr=1e-2, weight_decay=0.1)]


@dataclass(frozen=True)
class Layout:
    """How to train.

    Attributes:
        wrap: puts the model under its parallelism.
        optimizers: made of the wrapped model.
        micro_batches: gradient accumulation.
        autocast: precision of the forward pass under autocast.
        parameters: precision of the parameters.
        scaled: whether the loss is scaled (fp16).
        closure: whether forward and backward run inside of ``optimizer.step``.
        steps_itself: whether the optimizers step in the backward pass.
        attention: the one implementation of attention to use.
        options: of CriticalSharpness.
        mixed: whether the forward pass computes in bf16 without autocast.
    """

    wrap: Callable[[GPT], Wrapped] = plain
    optimizers: Optimizers = field(default_factory=adamw)
    micro_batches: int = 1
    clip: float = 0.0
    autocast: torch.dtype | None = None
    parameters: torch.dtype = torch.float32
    checkpointed: bool = False
    scaled: bool = False
    closure: bool = False
    steps_itself: bool = False
    attention: SDPBackend | None = None
    options: dict[str, Any] = field(default_factory=dict)
    mixed: bool = False

    @property
    def computes_in_low_precision(self) -> bool:
        return self.mixed or self.autocast is not None or self.parameters != torch.float32

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """The context of a forward pass."""
        with (
            torch.autocast(DEVICE, self.autocast, enabled=self.autocast is not None),
            sdpa_kernel(self.attention or [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]),
        ):
            yield


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

#: On one process.
SINGLE = {
    "plain": Layout(clip=0.5),
    "fused": Layout(optimizers=adamw(fused=True)),
    "foreach": Layout(optimizers=adamw(foreach=True)),
    "sgd": Layout(optimizers=sgd),
    "adafactor": Layout(optimizers=adafactor),
    "muon and adamw": Layout(optimizers=muon_and_adamw),
    "groups": Layout(optimizers=groups),
    "in backward": Layout(optimizers=in_backward, steps_itself=True),
    "accumulation": Layout(micro_batches=3, clip=0.5),
    "autocast": Layout(autocast=torch.bfloat16),
    "scaled": Layout(autocast=torch.float16, scaled=True, clip=0.5),
    "scaled and fused": Layout(autocast=torch.float16, scaled=True, optimizers=adamw(fused=True)),
    "bf16 parameters": Layout(parameters=torch.bfloat16),
    "checkpointing": Layout(checkpointed=True),
    "closure": Layout(closure=True),
    "offload": Layout(options={"offload": "cpu"}),
    "eval": Layout(options={"mode": "eval"}),
    "bisection": Layout(options={"method": "bisection"}),
    "compiled": Layout(wrap=compiled(plain)),
}

#: On two and on four processes.
DISTRIBUTED = {
    "ddp": Layout(wrap=ddp, clip=0.5),
    "ddp, accumulation, autocast": Layout(wrap=ddp, micro_batches=2, autocast=torch.bfloat16),
    "ddp, compiled": Layout(wrap=compiled(ddp)),
    "ddp, adafactor": Layout(wrap=ddp, optimizers=adafactor),
    "zero": Layout(wrap=ddp, optimizers=zero),
    "fsdp1 no_shard": Layout(wrap=fsdp1_no_shard),
    "fsdp2": Layout(wrap=fsdp2(), clip=0.5),
    "fsdp2, never resharded": Layout(wrap=fsdp2(reshard_after_forward=False)),
    "fsdp2, accumulation": Layout(wrap=fsdp2(), micro_batches=2, clip=0.5),
    "fsdp2, bf16": Layout(wrap=fsdp2(mp_policy=BF16), mixed=True),
    "fsdp2, cpu offload": Layout(
        wrap=fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=DEVICE == "cuda"))
    ),
    "fsdp2, checkpointing": Layout(wrap=fsdp2(), checkpointed=True),
    "fsdp2, fused": Layout(wrap=fsdp2(), optimizers=adamw(fused=True)),
    "fsdp2, groups": Layout(wrap=fsdp2(), optimizers=groups),
    "fsdp2, sgd": Layout(wrap=fsdp2(), optimizers=sgd),
    "fsdp2, muon and adamw": Layout(wrap=fsdp2(), optimizers=muon_and_adamw),
    "fsdp2, in backward": Layout(wrap=fsdp2(), optimizers=in_backward, steps_itself=True),
    "fsdp2, compiled": Layout(wrap=compiled(fsdp2())),
    "tensor parallel": Layout(wrap=tensor_parallel),
    "fsdp2 × tensor parallel": Layout(wrap=fsdp2_with_tensor_parallel),
    "hsdp": Layout(wrap=hsdp, clip=0.5),
    "fsdp2, before torch 2.13": Layout(wrap=fsdp2_before_torch_2_13),
}

#: On one GPU, beside the others.
GPU = {
    "flash attention, bf16": Layout(autocast=torch.bfloat16, attention=SDPBackend.FLASH_ATTENTION),
    "flash attention, bf16, compiled": Layout(
        wrap=compiled(plain), autocast=torch.bfloat16, attention=SDPBackend.FLASH_ATTENTION
    ),
}
