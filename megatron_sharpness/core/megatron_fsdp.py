"""Megatron-FSDP, inside of Megatron and as a package of its own: what an optimizer steps are slices
of buffers, and passes gather what they read bucket by bucket."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(module: object) -> bool:
    """Whether it is a ``MegatronFSDP`` module."""
    return hasattr(module, "all_gather_pipeline")


def module_of(parameter: Any) -> Any:
    """The ``MegatronFSDP`` module that a parameter of an optimizer belongs to."""
    original = parameter.orig_param
    return getattr(original, "_megatron_fsdp_model", None) or parameter._megatron_fsdp_model


def read_by_forward(parameter: Any) -> Tensor:
    """Where the forward pass reads the elements of ``parameter`` that this rank steps, as
    ``copy_main_weights_to_model_weights`` finds it (param_and_grad_buffer.py)."""
    original = parameter.orig_param
    buffer = module_of(parameter).param_and_grad_buffer
    group = buffer.parameter_groups[buffer.param_to_param_group[original]]
    main, weights = group.main_weight_buffer, group.model_weight_buffer
    if main is None:  # the model's own are stepped
        held: Tensor = parameter._local_tensor
        return held.detach()
    if weights is None:  # no_shard
        whole: Tensor = original.data
        return getattr(whole, "_local_tensor", whole)
    sharded = weights.is_data_distributed or main.is_data_distributed
    item: Tensor = weights.get_item(weights.param_idx[original], only_shard=sharded)
    return item.detach()


def start_in_weight(parameter: Any) -> int:
    """Where in its flattened weight the elements of ``parameter`` begin that this rank steps."""
    original = parameter.orig_param
    buffer = module_of(parameter).param_and_grad_buffer
    group = buffer.parameter_groups[buffer.param_to_param_group[original]]
    stepped = group.main_weight_buffer or group.model_weight_buffer
    if stepped is None or not stepped.is_data_distributed:
        return 0
    return int(stepped._get_item_slice_in_shard(stepped.param_idx[original])[0])


def settle_gathers(module: Any) -> None:
    """Wait for the gathers of a ``MegatronFSDP`` module that are in flight."""
    pipeline = module.all_gather_pipeline
    for bucket, backward in list(pipeline.param_gather_event_map):
        pipeline.wait_bucket_ready(bucket, backward)


def forget_gathers(module: Any) -> None:
    """Have passes gather anew: what was gathered, or is in flight, is of no use any more."""
    settle_gathers(module)
    module.synchronize_param_gather()
