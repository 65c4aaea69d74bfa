"""The distributed optimizer: each data-parallel rank steps a slice of every parameter buffer, and
an all-gather brings the slices of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_sharpness.megatron.shards.gathers import Gathers, Stepped


def owns(optimizer: Any) -> bool:
    """Whether it is a ``DistributedOptimizer``."""
    return hasattr(optimizer, "model_param_gbuf_map")


def stepped(optimizer: Any) -> Iterator[Stepped]:
    """Main parameters, and the slices of the buffers that the forward pass reads them from."""
    for main_groups, model_groups in (
        (optimizer.shard_fp32_from_float16_groups, optimizer.model_float16_groups),
        (optimizer.shard_fp32_groups, optimizer.model_fp32_groups),
    ):
        for mains, models in zip(main_groups, model_groups, strict=True):
            for main, model in zip(mains, models, strict=True):
                owned = optimizer._get_model_param_range_map(model)["param"]
                buffered = model.main_grad.view(-1)[owned.start : owned.end]
                held = slice_of_buffer(optimizer, model)
                yield Stepped.of(main, held, buffered, model)._replace(start=owned.start)


def gathers(model: Sequence[Any], optimizer: Any) -> list[Gathers]:
    """Those of the chunks with parameter buffers that are gathered."""
    chunks = [chunk for chunk in model if _is_gathered(getattr(chunk, "ddp_config", None))]
    return [BufferGathers(chunks)] if chunks else []


def _is_gathered(config: Any) -> bool:
    """Whether a chunk's buffers are; with Muon's older layout it may be by DDP's hooks alone."""
    if getattr(config, "use_megatron_fsdp", False):
        return False
    flags = ("use_distributed_optimizer", "overlap_param_gather")
    return any(getattr(config, flag, False) for flag in flags)


def slice_of_buffer(optimizer: Any, parameter: Tensor) -> Tensor:
    """The slice of the all-gathered parameter buffer that this rank's shard is written to."""
    buffer_index, _, bucket_index = optimizer.model_param_gbuf_map[parameter]
    bucket = optimizer.buffers[buffer_index].buckets[bucket_index]
    owned = optimizer._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
    flat: Tensor = bucket.param_data.view(-1)[owned.start : owned.end]
    return flat


class BufferGathers(Gathers):
    """The all-gathers of the parameter buffers of a model, and Megatron's account of them.

    Args:
        chunks: of the model, on this rank.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks = chunks
        self._groups = [group for chunk in self.chunks for group in _bucket_groups(chunk)]
        self._dispatched: list[bool] = []

    def settle(self) -> None:
        if not self._dispatched:
            self._dispatched = [group.param_gather_dispatched for group in self._groups]
        for group in self._groups:
            if group.param_gather_handle is not None:
                # start_param_sync(force_sync=True) only waits for a gather in flight and would
                # leave the others with old weights (param_and_grad_buffer.py).
                group.param_gather_handle.wait()
                group.param_gather_handle = None

    @torch.no_grad()
    def sync(self) -> None:
        """They are gathered here, or, where Megatron gathers bucket by bucket ahead of its forward
        pass (``--overlap-param-gather``), by that pass, behind its computation.
        """
        for chunk in self.chunks:
            if _gathers_ahead(chunk):
                for group in _bucket_groups(chunk):
                    group.param_gather_dispatched = False
            else:
                chunk.start_param_sync(force_sync=True)

    @torch.no_grad()
    def finish(self) -> None:
        for chunk in self.chunks:
            if _gathers_ahead(chunk):
                for group in reversed(_bucket_groups(chunk)):  # in the order of the pass
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def end(self) -> None:
        if any(self._dispatched):  # what Megatron takes for gathered
            self.finish()
        self.put_account_back()

    def put_account_back(self) -> None:
        for group, dispatched in zip(self._groups, self._dispatched, strict=True):
            group.param_gather_dispatched = dispatched


def _bucket_groups(chunk: Any) -> list[Any]:
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def _gathers_ahead(chunk: Any) -> bool:
    """Whether the forward pass of a model chunk gathers its parameters itself, as it goes."""
    return bool(chunk.remove_forward_pre_hook_handles)
