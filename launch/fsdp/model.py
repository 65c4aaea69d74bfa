"""The model: whose weights come later it has none until it is sharded, and each process then reads
its own shards alone."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import HuggingFaceStorageReader, state_dict_loader
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from fsdp import data
from fsdp.arguments import check_sequence
from fsdp.checkpoint import checkpoint_to_load
from fsdp.gpt import GPT
from megatron_sharpness.core.errors import bad_flag

#: What is fetched of a Hugging Face repository beside its weights.
FILES = ["*.json", "tokenizer*", "vocab*", "merges*"]


@dataclass
class Built:
    """A model that is not sharded yet.

    Attributes:
        model: in fp32; on the meta device where its weights are read later.
        vocabulary: how many tokens it knows.
        tokenize: its tokenizer.
        weights: the folder of safetensors that it is to be filled with, if so.
    """

    model: nn.Module
    vocabulary: int
    tokenize: data.Tokenize
    weights: Path | None = None


def build_model(args: argparse.Namespace) -> Built:
    """The model that the flags name.

    Raises:
        InputError: there is none, or it cannot be trained so.
    """
    torch.manual_seed(args.seed)
    loaded = checkpoint_to_load(args) is not None
    if args.hf_model:
        return _hugging_face(args, loaded)
    with torch.device("meta" if loaded else "cpu"):
        model = GPT(args.gpt)
    return Built(model, args.gpt.vocab_size, data.bytes_as_tokens)


def _hugging_face(args: argparse.Namespace, loaded: bool) -> Built:
    try:
        import transformers
        from accelerate import init_empty_weights
    except ModuleNotFoundError as error:
        raise bad_flag(
            "hf_model", args.hf_model, f"{error}; pip install transformers accelerate"
        ) from error
    automatic = transformers.AutoModelForCausalLM
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    try:
        folder = _fetched(args)
        config = transformers.AutoConfig.from_pretrained(folder)
        text = config.get_text_config()
        check_sequence(
            args,
            getattr(text, "max_position_embeddings", None),
            getattr(text, "attention_dropout", 0.0) or 0.0,
        )
        config.use_cache = False
        weights: Path | None = None
        if loaded or [*folder.glob("*.safetensors")]:
            with init_empty_weights(include_buffers=False):
                model = automatic.from_config(config, **options)
            model.tie_weights()  # what goes through there is a parameter of its own
            weights = None if loaded else folder
        elif [*folder.glob("*.bin")]:
            model = automatic.from_pretrained(folder, config=config, **options)
        else:
            model = automatic.from_config(config, **options)
        if weights is not None and not _held(weights) >= _names(model):  # its names are others
            model = automatic.from_pretrained(folder, config=config, **options)
            weights = None
        vocabulary = int(model.get_input_embeddings().num_embeddings)
        tokenize = data.bytes_as_tokens
        if [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            tokenize = data.tokens_of(tokenizer)
    except (OSError, ValueError) as error:
        raise bad_flag("hf_model", args.hf_model, str(error)) from error
    return Built(model.train(), vocabulary, tokenize, weights)


def _fetched(args: argparse.Namespace) -> Path:
    """The folder of the model, downloaded where it is none."""
    if Path(args.hf_model).is_dir():
        return Path(args.hf_model)
    from huggingface_hub import snapshot_download

    for weights in ("*.safetensors", "*.bin"):
        wanted = [weights, *FILES]
        found = snapshot_download(args.hf_model, revision=args.hf_revision, allow_patterns=wanted)
        if [*Path(found).glob(weights)]:
            return Path(found)
    raise ValueError("it holds no weights, neither safetensors nor .bin")


def _held(folder: Path) -> set[str]:
    """Names of the tensors in a folder's safetensors."""
    return set(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def _names(model: nn.Module) -> set[str]:
    """Names of what a model is filled with; of tied parameters the first."""
    parameters = dict(model.named_parameters())
    tied = set(dict(model.named_parameters(remove_duplicate=False))) - set(parameters)
    return set(model.state_dict()) - tied


def attention(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Within it ``scaled_dot_product_attention`` is flash attention where that is asked for."""
    if args.attention_backend == "flash":
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION])
    return contextlib.nullcontext()


def shard(args: argparse.Namespace, built: Built, device: torch.device) -> nn.Module:
    """Put each layer of the model, and the rest of it, under FSDP2 on ``device``, and fill it with
    the weights that are to be read from safetensors."""
    model = built.model
    names = _names(model) if built.weights is not None else set()
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (args.world_size,))}
    if args.bf16:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if args.fsdp_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    layers = next(lists, nn.ModuleList())  # the outermost
    for i, layer in enumerate(layers):
        if args.recompute_granularity == "full":
            layers[i] = checkpoint_wrapper(layer)
        fully_shard(layers[i], **options)
    fully_shard(model, **options)
    if any(parameter.is_meta for parameter in model.parameters()):
        held = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        model.to_empty(device="cpu" if args.fsdp_cpu_offload else device)
        for module, name, buffer in held:  # where they are needed, and with what is in them
            setattr(module, name, buffer)
    if built.weights is not None:
        state = {n: v for n, v in get_model_state_dict(model).items() if n in names}
        reader = HuggingFaceStorageReader(str(built.weights))
        state_dict_loader.load(state, storage_reader=reader)
    return model
