"""The parameters of Megatron's optimizers as shards of an update line, and their all-gathers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from torch import Tensor

from megatron_sharpness.core.products import StepProducts
from megatron_sharpness.core.update_line import Shard, UpdateLine
from megatron_sharpness.core.watch import Checksums


def leaf_optimizers(optimizer: Any) -> list[tuple[Any, Any]]:
    """The optimizers that own parameters, those of a chain or the one that there is, each with the
    group of ranks over which Megatron sums its gradient norm."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is None:
        return [(optimizer, optimizer.get_grad_stats_parallel_group())]
    leaves = [pair for member in chained for pair in leaf_optimizers(member)]
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        # Whole parameters are dealt out to the data-parallel ranks: all ranks together have all.
        return [(leaf, None) for leaf, _ in leaves]
    return leaves


def shards_of(optimizer: Any) -> list[Shard]:
    """This rank's shards of one leaf optimizer: main parameter and where the forward reads it."""
    return [
        Shard(main=main, model=model, counted=_is_counted(main, optimizer))
        for main, model in _main_and_model(optimizer)
    ]


def trained_tensors(model: Sequence[Any], optimizer: Any) -> list[Tensor]:
    """What training would change of a model, as far as this rank has it: the parameters that its
    optimizers own, main and in the model, and the buffers."""
    shards = [shard for leaf, _ in leaf_optimizers(optimizer) for shard in shards_of(leaf)]
    buffers = [buffer for chunk in model for buffer in chunk.module.buffers()]
    return [*(tensor for shard in shards for tensor in (shard.main, shard.model)), *buffers]


def _main_and_model(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if optimizer.is_stub_optimizer:  # this rank has nothing to train
        return
    if hasattr(optimizer, "model_param_gbuf_map"):  # DistributedOptimizer
        for mains, models in (
            (optimizer.shard_fp32_from_float16_groups, optimizer.model_float16_groups),
            (optimizer.shard_fp32_groups, optimizer.model_fp32_groups),
        ):
            for main, model in _flat_pairs(mains, models):
                yield main, _slice_of_buffer(optimizer, model)
    elif hasattr(optimizer, "float16_groups"):  # Float16OptimizerWithFloat16Params
        yield from _flat_pairs(optimizer.fp32_from_float16_groups, optimizer.float16_groups)
        yield from _flat_pairs(optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups)
    else:  # FP32Optimizer
        for parameter in optimizer.get_parameters():
            yield parameter, parameter


def _flat_pairs(
    mains: Sequence[Sequence[Tensor]], models: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    for main_group, model_group in zip(mains, models, strict=True):
        yield from zip(main_group, model_group, strict=True)


def _slice_of_buffer(optimizer: Any, parameter: Tensor) -> Tensor:
    """The slice of the all-gathered parameter buffer that this rank's shard is written to."""
    buffer_index, _, bucket_index = optimizer.model_param_gbuf_map[parameter]
    bucket = optimizer.buffers[buffer_index].buckets[bucket_index]
    owned = optimizer._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
    flat: Tensor = bucket.param_data.view(-1)[owned.start : owned.end]
    return flat


_DUPLICATE_GROUPS = tuple(
    name
    for name in ("tp_group", "expert_tp_group")
    if name in inspect.signature(tensor_parallel.param_is_not_tensor_parallel_duplicate).parameters
)


def _is_counted(main: Tensor, optimizer: Any) -> bool:
    """Whether Megatron counts this copy in the gradient norm: not shared, no tensor-parallel
    duplicate."""
    groups = {name: getattr(optimizer, name, None) for name in _DUPLICATE_GROUPS}
    return not getattr(main, "shared", False) and bool(
        tensor_parallel.param_is_not_tensor_parallel_duplicate(main, **groups)
    )


def _bucket_groups(chunk: Any) -> list[Any]:
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def _gathers_ahead(chunk: Any) -> bool:
    """Whether the forward pass of a model chunk gathers its parameters itself, as it goes."""
    return bool(chunk.remove_forward_pre_hook_handles)


class MegatronLine:
    """One optimizer step's line over all leaf optimizers, written into Megatron's model.

    Args:
        model: the model chunks of this rank, as ``train_step`` gets them.
        offload: keep the copies in host memory.
    """

    def __init__(self, model: Sequence[Any], *, offload: bool) -> None:
        self.model = model
        self.offload = offload
        self.lines: list[tuple[UpdateLine, Any]] = []
        self.gathered = [
            chunk
            for chunk in model
            if getattr(getattr(chunk, "ddp_config", None), "use_distributed_optimizer", False)
        ]
        self.bucket_groups = [group for chunk in self.gathered for group in _bucket_groups(chunk)]
        self.is_open = False
        self._dispatched: list[bool] = []

    @property
    def coarse(self) -> bool:
        """Whether this rank has a part of a model in 16 bits."""
        shards = [shard for line, _ in self.lines for shard in line.shards]
        return any(shard.model.dtype.itemsize < 4 for shard in shards)

    def begin(self, optimizer: Any) -> None:
        """Keep θ_t of all that ``optimizer`` is about to step."""
        self.is_open = False
        self._dispatched = []
        self.lines = [
            (UpdateLine(shards_of(leaf), offload=self.offload), group)
            for leaf, group in leaf_optimizers(optimizer)
        ]
        for line, _ in self.lines:
            line.begin()

    def weights(self) -> Checksums:
        """Of this rank's shards, in the model and in the optimizer."""
        shards = [shard for line, _ in self.lines for shard in line.shards]
        return Checksums(t for s in shards for t in ((s.main,) if s.aliased else (s.main, s.model)))

    def gather(self) -> None:
        """Have the shards of all ranks in the model, as they are. Collective."""
        self.settle()
        self.sync()
        self.finish()
        self._put_account_back()

    def end(self) -> None:
        """Take θ_{t+1}, and the gathers that the next forward pass would have waited for."""
        for line, _ in self.lines:
            line.end()
        self.is_open = True
        self.settle()

    def settle(self) -> None:
        """Wait for gathers in flight, and keep Megatron's account of them as it is after a step."""
        if not self._dispatched:
            self._dispatched = [group.param_gather_dispatched for group in self.bucket_groups]
        for group in self.bucket_groups:
            if group.param_gather_handle is not None:
                # start_param_sync(force_sync=True) only waits for a gather in flight and would
                # leave the others with old weights (param_and_grad_buffer.py).
                group.param_gather_handle.wait()
                group.param_gather_handle = None

    def move(self, fraction: float) -> None:
        """Write this rank's shards of θ(fraction). :meth:`sync` must follow on all ranks."""
        for line, _ in self.lines:
            line.move(fraction)

    @torch.no_grad()
    def sync(self) -> None:
        """Have the next forward pass see the shards of all ranks. :meth:`finish` must follow it.

        They are gathered here, or, where Megatron gathers bucket by bucket ahead of its forward
        pass (``--overlap-param-gather``), by that pass, behind its computation.
        """
        for chunk in self.gathered:
            if _gathers_ahead(chunk):
                for group in _bucket_groups(chunk):
                    group.param_gather_dispatched = False
            else:
                chunk.start_param_sync(force_sync=True)

    @torch.no_grad()
    def finish(self) -> None:
        """The gathers that a pass did not make since it broke off: the other ranks wait in them."""
        for chunk in self.gathered:
            if _gathers_ahead(chunk):
                for group in reversed(_bucket_groups(chunk)):  # in the order of the pass
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def restore(self, *, frozen: bool = False) -> None:
        """θ_{t+1} back into the model, and Megatron's own account of its gathers.

        With ``frozen`` it is θ_t, and the optimizer's main parameters are put back, too.
        Collective, and nothing at all once the line was released.
        """
        if not self.is_open:
            return
        self.move(0.0 if frozen else 1.0)
        for line, _ in self.lines if frozen else ():
            line.undo()
        self.sync()
        if any(self._dispatched):  # what Megatron takes for gathered
            self.finish()
        self._put_account_back()
        self.release()

    def _put_account_back(self) -> None:
        for group, dispatched in zip(self.bucket_groups, self._dispatched, strict=True):
            group.param_gather_dispatched = dispatched

    def release(self) -> None:
        """Give the copies back."""
        self.is_open = False
        self.lines = []

    def products(self) -> Tensor:
        """The fields of :class:`StepProducts` over all ranks; fp64.

        g is the main gradient that the step has used, clipped as it was. Summed as Megatron sums
        the gradient norm: each optimizer over its own group of ranks.
        """
        device = torch.cuda.current_device()
        total = torch.zeros(StepProducts.COUNT, dtype=torch.float64, device=device)
        for line, group in self.lines:
            partial = torch.zeros_like(total)
            line.products((shard.main.grad for shard in line.shards), partial)
            torch.distributed.all_reduce(partial, group=group)
            total += partial
        return total
