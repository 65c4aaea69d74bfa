"""DeepSpeed: an engine's optimizer has another one step copies of the weights, whole ones or this
rank's partitions, writes them to where the model reads them, and gathers what other ranks stepped.

Nothing is imported from DeepSpeed before it has been by who trains with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from megatron_sharpness.core.errors import InputError, refuse
from megatron_sharpness.core.update_line import Shard
from megatron_sharpness.pytorch.shards.tensors import Tensors

#: What ZeRO 3 notes of modules in passes: parameters that they read of others, and recomputations.
NOTED = ("_external_params", "ds_recompute_parameters")


class DeepSpeedShards(Tensors, ABC):
    """Those of the optimizer that ``deepspeed.initialize`` returns, where it is around another."""

    #: Whether each rank steps a part of the weights, and not all of them as every other does.
    partitioned = True

    #: Where the optimizer keeps the model's parameters, by group.
    models = "fp16_groups"

    @abstractmethod
    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is stepped, and where the model reads the same elements."""

    def of_model(self) -> list[Tensor]:
        return list(chain.from_iterable(getattr(self.optimizer, self.models)))

    def parameters(self) -> list[Tensor]:
        return [main for main, _ in self.pairs()]

    def shards(self) -> list[Shard]:
        counted = self.partitioned or dist.get_rank() == self.first_rank
        return [
            Shard(main=main.detach(), model=model.detach(), counted=counted)
            for main, model in self.pairs()
        ]

    def groups(self) -> list[dict[str, Any]]:
        # Whose parameters are put in for the time of a step alone.
        return list(self.optimizer.optimizer.param_groups)

    def inside(self) -> list[Optimizer]:
        # ZeRO 3 that offloads a part has a second one, for what stays on the device.
        both = [self.optimizer.optimizer, getattr(self.optimizer, "backup_optimizer", None)]
        return [inner for inner in both if inner is not None]

    def gradients(self) -> list[Tensor | None]:
        return []

    @property
    def steps_on_gradients(self) -> bool:
        # Before Muon's steps DeepSpeed puts its orthogonal updates in their place.
        return not any(group.get("use_muon") for group in self.groups())

    def gradients_in(self, inner: Optimizer) -> dict[int, Tensor | None]:
        stepped = {id(p) for group in inner.param_groups for p in group["params"]}
        mains = enumerate(self.parameters())
        return {number: main.grad for number, main in mains if id(main) in stepped}

    @torch.no_grad()
    def sync(self) -> None:
        # What the next forward pass does first, whichever it is.
        if hasattr(self.optimizer, "clear_backward_seen_flag"):
            self.optimizer.clear_backward_seen_flag()


class WholeShards(DeepSpeedShards):
    """In 16 bits without ZeRO: every rank steps everything."""

    partitioned = False


class FlatShards(WholeShards):
    """Each group in one tensor."""

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.optimizer.fp32_groups_flat, self.optimizer.fp16_groups_flat, strict=True)


class UnfusedShards(WholeShards):
    """Each parameter by itself."""

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        mains = chain.from_iterable(self.optimizer.fp32_groups)
        return zip(mains, self.of_model(), strict=True)


class PartitionShards(DeepSpeedShards):
    """ZeRO 1 and 2: each rank steps its part of each group, and has all weights to read."""

    mains, models, partitions = (
        "single_partition_of_fp32_groups", "bit16_groups", "parallel_partitioned_bit16_groups"
    )  # fmt: skip
    flat = "bit16_groups_flat"

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for main, parts, group in zip(
            getattr(self.optimizer, self.mains),
            getattr(self.optimizer, self.partitions),
            self.optimizer.real_dp_process_group,
            strict=True,
        ):
            yield main, parts[dist.get_rank(group)]

    @torch.no_grad()
    def sync(self) -> None:
        super().sync()
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=getattr(self.optimizer, self.flat),
            partitioned_param_groups=getattr(self.optimizer, self.partitions),
            dp_process_group=self.optimizer.real_dp_process_group,
            start_alignment_factor=self.optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=self.optimizer.allgather_bucket_size,
        )


class Bf16PartitionShards(PartitionShards):
    """ZeRO 1 in bf16 with gradients that are accumulated in fp32."""

    mains, models, partitions = (
        "fp32_groups_flat_partition", "bf16_groups", "bf16_partitioned_groups"
    )  # fmt: skip
    flat = "bf16_groups_flat"


class GatheredShards(DeepSpeedShards):
    """ZeRO 3: each rank has its part of each weight, from which passes gather it."""

    _scale = 1.0

    def check(self) -> None:
        self._scale = self.optimizer.loss_scale

    @property
    def steps_on_gradients(self) -> bool:
        # In a step after which the loss is scaled by more, it divides gradients by that already.
        return super().steps_on_gradients and self._scale == self.optimizer.loss_scale

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(
            self.optimizer.fp32_partitioned_groups_flat,
            self.optimizer.fp16_partitioned_groups_flat,
            strict=True,
        )

    def settle(self) -> None:
        self.optimizer._partition_all_parameters()  # passes keep some, and gather ahead

    @torch.no_grad()
    def sync(self) -> None:
        super().sync()
        if kept := self.optimizer.persistent_parameters:
            kept[0].all_gather(kept)


#: By the name of the optimizer's class.
_KINDS: dict[str, type[DeepSpeedShards]] = {
    "FP16_Optimizer": FlatShards,
    "FP16_UnfusedOptimizer": UnfusedShards,
    "BF16_Optimizer": Bf16PartitionShards,
    "DeepSpeedZeroOptimizer": PartitionShards,
    "DeepSpeedZeroOptimizer_Stage3": GatheredShards,
}


def owns(optimizer: object) -> bool:
    """Whether it is an engine's, around another one."""
    return _derives(optimizer, "deepspeed.runtime.base_optimizer", "DeepSpeedOptimizer")


def is_engine(model: object) -> bool:
    """Whether ``deepspeed.initialize`` has made it."""
    return _derives(model, "deepspeed.runtime.engine", "DeepSpeedEngine")


def _derives(value: object, module: str, name: str) -> bool:
    bases = type(value).__mro__
    return any((base.__module__, base.__name__) == (module, name) for base in bases)


def shards_of(optimizer: Any, first_rank: int) -> DeepSpeedShards:
    """Those of an engine's optimizer.

    Raises:
        InputError: it is of a kind that cannot be measured with.
    """
    name = type(optimizer).__name__
    if name not in _KINDS:
        raise InputError(
            f"optimizer: {name} of DeepSpeed has not been made to work; train with ZeRO 0, 1, 2 or "
            "3, without ZenFlow, SuperOffload and MiCS"
        )
    return _KINDS[name](optimizer, first_rank)


def refuse_engine(engine: Any, optimizers: Sequence[object]) -> None:
    """Raise where a measurement would be wrong or impossible.

    Raises:
        InputError: with all reasons.
    """
    zero = engine._config.zero_config
    offloaded = [o.device for o in (zero.offload_param, zero.offload_optimizer) if o is not None]
    inner = type(engine.basic_optimizer).__name__
    refuse(
        {
            f"optimizer: the engine steps its {type(engine.optimizer).__name__}, and not what was "
            "given; give the optimizer that deepspeed.initialize has returned": (
                not any(optimizer is engine.optimizer for optimizer in optimizers)
            ),
            "model: PipelineModule runs forward and backward passes in one; use ZeRO": (
                engine.pipeline_parallelism
            ),
            "tensor_parallel.autotp_size: ranks hold copies of some weights and parts of others, "
            "which DeepSpeed does not tell apart; use ZeRO": engine.autotp_size() > 1,
            "model: DeepSpeed's mixtures of experts have groups of ranks of their own, which has "
            "not been tried; train without experts, or with Megatron-LM": engine.has_moe_layers,
            "data_efficiency.random_ltd drops tokens by a schedule that has gone on when the step "
            "is evaluated again; leave it out": engine.random_ltd_enabled(),
            "compile.deepcompile has the compiled passes gather the weights, which has not been "
            "tried; leave it out": engine.is_deepcompile_enabled(),
            "zero_optimization.zero_hpz_partition_size and zero_quantized_weights keep further "
            "copies of the weights, which a move would leave behind; leave them out": (
                zero.zero_hpz_partition_size > 1 or zero.zero_quantized_weights
            ),
            "zero_optimization.offload_*.device: what lies on NVMe is not in memory to be moved; "
            "offload to the CPU": any(str(device).endswith("nvme") for device in offloaded),
            f"optimizer: {inner} sends compressed moments in place of gradients; use Adam": (
                inner.startswith(("Onebit", "ZeroOne"))
            ),
        }
    )
