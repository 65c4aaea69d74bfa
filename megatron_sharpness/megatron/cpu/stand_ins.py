"""What replaces Megatron's own parts where those count on a GPU, its kernels or a compiler."""

from __future__ import annotations

import copy
import functools
import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_sharpness.megatron.cpu.attention import complete_attention
from megatron_sharpness.megatron.cpu.cuda import HostTensors
from megatron_sharpness.megatron.cpu.fused_adam import stand_in_for_fused_adam


def replace_parts() -> None:
    """Put every stand-in of this file in its place. This imports Megatron."""
    # The host's random state is the device's here, so it does change where Megatron warns of it.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    _keep_the_compiled_helper()
    _local_layers_for_bert()
    _routers_without_transformer_engine()
    _no_layers_of_inference()
    _norms_like_transformer_engines()
    _norms_of_images()
    _copies_for_the_checkpoint_writer()
    _optimizers_on_the_host()
    _activations_on_the_host()
    _local_layers_are_enough()
    complete_attention()
    stand_in_for_fused_adam()


def _keep_the_compiled_helper() -> None:
    # The wheel ships the compiled helper, but not the Makefile that this would call.
    import megatron.core.datasets.utils as dataset_utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        pass
    else:
        dataset_utils.compile_helpers = lambda: None


def _local_layers_for_bert() -> None:
    # Its script asks for Transformer Engine's whatever --transformer-impl says.
    from megatron.core.models.bert import bert_layer_specs

    local = bert_layer_specs.bert_layer_local_spec
    bert_layer_specs.bert_layer_with_transformer_engine_spec = local


def _routers_without_transformer_engine() -> None:
    # Megatron-LM 0.16 asks for this name without having set it where the import failed.
    from megatron.core.transformer.moe import moe_utils

    vars(moe_utils).setdefault("te_general_gemm", None)


def _no_layers_of_inference() -> None:
    # Megatron-LM 0.20 asks, in training too, whether a layer is one of those that Transformer
    # Engine's are derived for, and without that cannot.
    from megatron.core.transformer import multi_token_prediction

    if hasattr(multi_token_prediction, "is_inference_column_parallel_linear"):
        multi_token_prediction.is_inference_column_parallel_linear = lambda module: False


def _norms_like_transformer_engines() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build_norm = WrappedTorchNorm.__new__

    def build_other_norm(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        # PyTorch's norm is right under sequence parallelism as long as its gradients are summed
        # over the tensor-parallel ranks, which Megatron does for parameters that carry this mark.
        plain = copy.copy(config)
        plain.sequence_parallel = plain.layernorm_zero_centered_gamma = False
        norm = build_norm(cls, plain, *args, **kwargs)
        if config.layernorm_zero_centered_gamma:
            norm.__class__ = _CENTERED[type(norm)]
            torch.nn.init.zeros_(norm.weight)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = build_other_norm


class _CenteredLayerNorm(torch.nn.LayerNorm):
    """With 1 + weight (``--apply-layernorm-1p``)."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class _CenteredRMSNorm(torch.nn.RMSNorm):
    """With 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, list(self.normalized_shape), self.weight + 1, self.eps)


_CENTERED: dict[type, type] = {
    torch.nn.LayerNorm: _CenteredLayerNorm,
    torch.nn.RMSNorm: _CenteredRMSNorm,
}


def _norms_of_images() -> None:
    # The first norm of the vision model is PyTorch's by default, which takes no configuration.
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build: Any = CLIPViTModel.__init__
    build.__defaults__ = tuple(
        WrappedTorchNorm if default is torch.nn.LayerNorm else default
        for default in build.__defaults__
    )


def _copies_for_the_checkpoint_writer() -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    prepare = FileSystemWriterAsync.prepare_write_data

    def prepare_copies(writer: Any, *args: Any, **kwargs: Any) -> None:
        # From a GPU the writer's process takes a copy to the host. What is on the host already it
        # would share with the training, which goes on while it writes.
        prepare(writer, *args, **kwargs)
        writer.write_buckets = [
            (path, key, (blobs, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (blobs, tensors) in writer.write_buckets
        ]

    FileSystemWriterAsync.prepare_write_data = prepare_copies


def _optimizers_on_the_host() -> None:
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    split = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    @functools.wraps(split)
    def split_by_place(self: Any, *args: Any, **kwargs: Any) -> Any:
        # It asks its parameters which of them it has moved to the host.
        with HostTensors():
            return split(self, *args, **kwargs)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = split_by_place


#: Arguments that Megatron accepts with Transformer Engine's layers alone, and others can do.
_INSISTS = ("fine_grained_activation_offloading", "qk_clip", "log_max_attention_logit")


def _activations_on_the_host() -> None:
    # Offloading them tells Transformer Engine so, and ties the process to the CPU that is nearest
    # to its GPU.
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel import utils

    engine: Any = transformer_engine
    engine.cpu_offload = SimpleNamespace(CPUOffloadEnabled=False)
    utils.set_ideal_affinity_for_current_gpu = lambda: None


def _local_layers_are_enough() -> None:
    from megatron.training import arguments, initialize

    validate = arguments.validate_args

    @functools.wraps(validate)
    def validate_without_engine(args: Any, *rest: Any, **kwargs: Any) -> Any:
        wanted = {name: getattr(args, name) for name in _INSISTS if hasattr(args, name)}
        vars(args).update(dict.fromkeys(wanted, False))
        result = validate(args, *rest, **kwargs)
        vars(args).update(wanted)
        return result

    for module in (arguments, initialize):
        if getattr(module, "validate_args", None) is validate:
            module.validate_args = validate_without_engine
