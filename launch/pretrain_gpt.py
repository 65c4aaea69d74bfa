"""Pretrain a GPT with Megatron's own training loop.

The megatron-core wheel holds ``megatron.training`` but no script to start it with. This is one,
for dense and mixture-of-experts decoders, on the wheels from 0.18 on and on Megatron-LM checkouts
from core_v0.16.1 on. It takes Megatron's arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import arguments, get_args, get_timers, get_tokenizer, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_sharpness.adaptive_mix.adaptive import add_arguments

# Megatron's own pretrain_gpt.py knows these; here they would be ignored, so they are refused.
NOT_HERE = ("check_for_spiky_loss", "fim_data", "reset_attention_mask", "sft")

Batch = dict[str, torch.Tensor]


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """This pipeline stage's part of the model, on any parallel layout."""
    args = get_args()
    refused = [name for name in NOT_HERE if getattr(args, name, None)]
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    if args.mtp_num_layers and layout and "m" not in str(layout).split("|")[-1]:
        refused = ["pipeline_model_parallel_layout"]  # of what lies elsewhere no data is read here
    if refused:
        flag = "--" + refused[0].replace("_", "-")
        raise SystemExit(f"{flag}: not supported by this script; use Megatron-LM's pretrain_gpt.py")
    config = config or core_transformer_config_from_args(args)
    with_engine = args.transformer_impl == "transformer_engine"
    layer = {
        "use_transformer_engine": with_engine,
        "normalization": args.normalization,
        "qk_l2_norm": args.qk_l2_norm,
        "vp_stage": vp_stage,
    }
    layers_of_mtp = None
    if args.mtp_num_layers:  # like the last layer of the decoder
        layers_of_mtp = get_gpt_mtp_block_spec(
            config,
            get_gpt_decoder_layer_specs(config, **layer)[-1],
            use_transformer_engine=with_engine,
            vp_stage=vp_stage,
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, **layer),
        mtp_block_spec=layers_of_mtp,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def get_batch(data_iterator: Iterator[Batch] | None) -> Batch:
    """The next micro-batch, read by the first tensor-parallel rank and handed to the others."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    data = next(data_iterator) if first and data_iterator is not None else None
    ids = tensor_parallel.broadcast_data(["tokens", "labels", "position_ids"], data, torch.int64)
    mask = tensor_parallel.broadcast_data(["loss_mask"], data, torch.float32)
    return {key: context_parallel_part(value) for key, value in {**ids, **mask}.items()}


def context_parallel_part(value: torch.Tensor) -> torch.Tensor:
    """Of 2n slices of the sequence, the i-th and the i-th from the end: causal work is even so."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return value
    rank = parallel_state.get_context_parallel_rank()
    slices = value.chunk(2 * size, dim=1)
    return torch.cat([slices[rank], slices[2 * size - 1 - rank]], dim=1)


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss, number of tokens, and both for the log, as Megatron's schedules want them."""
    loss_mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output.reshape(-1).float() * loss_mask)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    tokens = loss_mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def forward_step(
    data_iterator: Iterator[Batch] | None,
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, Any]:
    """One micro-batch through this stage; between the first and the last it needs no data.

    With ``return_schedule_plan`` it is planned, and made by a schedule that overlaps it with a
    backward pass (``--overlap-moe-expert-parallel-comm``).
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch: Batch = {}
    if is_first_or_last_pipeline_stage(get_attr_wrapped_model(model, "vp_stage")):
        batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch.get("tokens"),
        batch.get("position_ids"),
        None,  # the layers are causal by themselves
        labels=batch.get("labels"),
        loss_mask=batch.get("loss_mask"),
    )
    return output, partial(loss_func, batch.get("loss_mask"))


def build_datasets(samples: list[int | None], vp_stage: int | None = None) -> Any:
    """Training, validation and test sets, on the ranks that read them."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def is_built_on_rank() -> bool:
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        return bool(first and is_first_or_last_pipeline_stage(vp_stage))

    dataset = MockGPTDataset if args.mock_data else GPTDataset

    def build(sizes: list[int | None], config: GPTDatasetConfig) -> Any:
        return BlendedMegatronDatasetBuilder(dataset, sizes, is_built_on_rank, config).build()

    training, *others = build(samples, config)
    if args.adaptive_mix:
        from megatron_sharpness.megatron.adaptive_mix import adaptive_blend

        def component(prefix: str) -> Any:
            return build([samples[0], 0, 0], replace(config, blend=([prefix], None)))[0]

        prefixes, weights = blend or ([], None)
        training = adaptive_blend(prefixes, weights or [], component)
    return training, *others


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # built on every rank


def main() -> None:
    """Hand model, data and step to Megatron."""
    parts = {
        "train_valid_test_dataset_provider": build_datasets,
        "model_provider": build_model,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    if hasattr(arguments, "parse_and_validate_args"):  # from 0.18 on scripts parse the arguments
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        args = arguments.parse_and_validate_args(add_arguments)
        pretrain(pretrain_cfg_container_from_args(args), **parts)
    else:
        pretrain(**parts, extra_args_provider=add_arguments)


if __name__ == "__main__":
    main()
