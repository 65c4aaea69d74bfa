"""A Megatron run as its flags describe it: how large it is, and how it is laid out on GPUs."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_sharpness.core.errors import InputError, bad_flag, flag_of

#: Tokens of the vocabulary where the configuration does not say: Llama 2's, or the tokenizer's.
VOCABULARY = 32000
VOCABULARIES = {"GPT2BPETokenizer": 50257}

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size")


@dataclass(frozen=True)
class Run:
    """A training run, as far as the cost of its measurements depends on it.

    Attributes:
        parameters: of the whole model.
        share: parameters of the largest pipeline stage on one of its tensor-parallel ranks.
        owned: how many of them the rank's optimizer steps.
        flops: floating-point operations of a forward pass over the global batch.
        gpus, tensor, stages, context, data: ranks, and how they are laid out.
        micro_batches: of a global batch, one after the other.
        fp32: the model itself is in fp32, and not in 16 bits with fp32 main parameters.
        sharded: the distributed optimizer shards over the ``data`` · ``context`` ranks.
        overlaps: the forward pass gathers ahead of its computation (``--overlap-param-gather``).
        recomputes: the backward pass repeats the whole forward pass.
        offloads: the copies lie in host memory.
    """

    parameters: int
    share: int
    owned: int
    flops: float
    gpus: int
    tensor: int
    stages: int
    context: int
    data: int
    micro_batches: int
    fp32: bool
    sharded: bool
    overlaps: bool
    recomputes: bool
    offloads: bool

    @property
    def model_bytes(self) -> int:
        """Bytes of a parameter where the forward pass reads it."""
        return 4 if self.fp32 else 2

    @property
    def copies(self) -> int:
        """fp32 copies of the owned parameters: θ_t, and θ_{t+1} where probes overwrite it."""
        return 2 if self.fp32 else 1

    @property
    def memory(self) -> int:
        """Bytes that a measurement takes on the device, or on the host: 4 · copies · owned."""
        return 4 * self.copies * self.owned

    @property
    def gathered(self) -> float:
        """Bytes of the share that come from other ranks: model_bytes · share · (n − 1)/n, with the
        n = data · context ranks that the optimizer is sharded over."""
        if not self.sharded:
            return 0.0
        return self.model_bytes * self.share * (1 - 1 / (self.data * self.context))


def count_parameters(flags: argparse.Namespace, *, tensor: int = 1, stages: int = 1) -> int:
    """Parameters of a dense GPT, or of the largest of its ``stages`` on a tensor-parallel rank.

    A layer of width h has, with the width q of all queries and k of all keys, 2hq + 2hk in the
    attention and 2hf in the MLP of width f (3hf with SwiGLU), and its biases and norms.
    """
    h: int = flags.hidden_size
    queries = flags.num_attention_heads * flags.kv_channels
    keys = flags.num_query_groups * flags.kv_channels
    gated = flags.ffn_hidden_size * (2 if flags.swiglu else 1)
    norm = h if flags.normalization == "RMSNorm" else 2 * h
    weights = 2 * h * (queries + keys) + h * (gated + flags.ffn_hidden_size)
    layer: int = weights // tensor + 2 * norm
    if not flags.disable_bias_linear:
        layer += (queries + 2 * keys + gated) // tensor + 2 * h
    multiple = flags.make_vocab_size_divisible_by * flags.tensor_model_parallel_size
    embedding: int = math.ceil(flags.vocab_size / multiple) * multiple // tensor * h
    learned = flags.position_embedding_type == "learned_absolute"
    inputs = embedding + (flags.max_position_embeddings * h if learned else 0)
    outputs = norm + embedding if flags.untie_embeddings_and_output_weights else norm
    layers: int = flags.num_layers // stages * layer
    if stages == 1:
        return layers + inputs + outputs
    return layers + max(inputs, norm + embedding)  # tied embeddings are on the last stage too


def count_flops(flags: argparse.Namespace, parameters: int, samples: int) -> float:
    """Floating-point operations of a forward pass over ``samples`` sequences: a token takes two for
    each parameter, and 2 · seq-length · (width of all queries) in each layer's causal attention."""
    queries = flags.num_attention_heads * flags.kv_channels
    attention = 2 * flags.num_layers * flags.seq_length * queries
    return float(samples * flags.seq_length * (2 * parameters + attention))


def plan(flags: argparse.Namespace, gpus: int) -> Run:
    """The run that :func:`parse_flags`' result describes, on ``gpus`` GPUs.

    Raises:
        InputError: they cannot be laid out; names flag, value, reason and remedy.
    """
    tensor, stages = flags.tensor_model_parallel_size, flags.pipeline_model_parallel_size
    context = flags.context_parallel_size
    if gpus % (tensor * stages * context):
        raise bad_flag(
            "gpus", gpus,
            f"not a multiple of {tensor * stages * context}, the tensor parallel {tensor} × "
            f"pipeline parallel {stages} × context parallel {context} of the configuration; give "
            "a multiple of it",
        )  # fmt: skip
    data = gpus // (tensor * stages * context)
    each = flags.micro_batch_size * data
    samples = flags.global_batch_size or each
    if samples % each:
        raise bad_flag(
            "global_batch_size", samples,
            f"not a multiple of --micro-batch-size {flags.micro_batch_size} × data parallel "
            f"{data}; give a multiple of {each}, or --gpus that suit it",
        )  # fmt: skip
    for name, divisor in (
        ("num_layers", "pipeline_model_parallel_size"),
        ("num_attention_heads", "tensor_model_parallel_size"),
        ("num_query_groups", "tensor_model_parallel_size"),
        ("ffn_hidden_size", "tensor_model_parallel_size"),
    ):
        if getattr(flags, name) % getattr(flags, divisor):
            raise bad_flag(
                name, getattr(flags, name),
                f"not a multiple of {flag_of(divisor)} {getattr(flags, divisor)}; give a multiple "
                "of it",
            )  # fmt: skip
    parameters = count_parameters(flags)
    share = count_parameters(flags, tensor=tensor, stages=stages)
    sharded = flags.use_distributed_optimizer
    return Run(
        parameters=parameters,
        share=share,
        owned=math.ceil(share / (data * context)) if sharded else share,
        flops=count_flops(flags, parameters, samples),
        gpus=gpus,
        tensor=tensor,
        stages=stages,
        context=context,
        data=data,
        micro_batches=samples // each,
        fp32=not (flags.bf16 or flags.fp16),
        sharded=sharded,
        overlaps=sharded and flags.overlap_param_gather,
        recomputes=flags.recompute_granularity == "full",
        offloads=flags.critical_sharpness_offload == "cpu",
    )


def split(text: str) -> list[str]:
    """The words of a configuration, without its comments."""
    return shlex.split(text, comments=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; write it as Megatron's own --help has it")


def parse_flags(words: Sequence[str]) -> argparse.Namespace:
    """Of Megatron's flags those that the estimate needs, with Megatron's defaults.

    Raises:
        InputError: one is missing, or cannot be estimated with.
    """
    parser = _Parser(allow_abbrev=False, add_help=False)
    for name in (*REQUIRED, "ffn_hidden_size", "kv_channels", "max_position_embeddings",
                 "global_batch_size", "vocab_size", "num_experts"):  # fmt: skip
        parser.add_argument(flag_of(name), type=int)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size",
                 "context_parallel_size", "num_query_groups"):  # fmt: skip
        parser.add_argument(flag_of(name), type=int, default=1)
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    for name in ("group_query_attention", "multi_latent_attention", "swiglu", "disable_bias_linear",
                 "untie_embeddings_and_output_weights", "bf16", "fp16", "use_distributed_optimizer",
                 "overlap_param_gather"):  # fmt: skip
        parser.add_argument(flag_of(name), action="store_true")
    parser.add_argument("--normalization", default="LayerNorm")
    parser.add_argument("--position-embedding-type", default="learned_absolute")
    parser.add_argument("--tokenizer-type")
    parser.add_argument("--recompute-granularity")
    parser.add_argument("--critical-sharpness-offload", choices=["none", "cpu"], default="none")
    flags, _ = parser.parse_known_args(words)
    _check_flags(flags)
    _fill_in(flags)
    return flags


def _check_flags(flags: argparse.Namespace) -> None:
    for name in REQUIRED:
        if getattr(flags, name) is None:
            raise InputError(f"{flag_of(name)}: missing; add it to the configuration")
    for name in ("num_experts", "multi_latent_attention"):
        if getattr(flags, name):
            raise bad_flag(
                name, getattr(flags, name),
                "the estimate counts the parameters of dense models with plain attention only; "
                "measure such a run instead, its log has the seconds",
            )  # fmt: skip
    for name, value in vars(flags).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise bad_flag(name, value, "must be at least 1; give such a number")


def _fill_in(flags: argparse.Namespace) -> None:
    """Defaults that depend on other flags, as in Megatron."""
    if flags.ffn_hidden_size is None:
        wide = 4 * flags.hidden_size
        flags.ffn_hidden_size = int(wide * 2 / 3 / 64) * 64 if flags.swiglu else wide
    flags.kv_channels = flags.kv_channels or flags.hidden_size // flags.num_attention_heads
    if not flags.group_query_attention:
        flags.num_query_groups = flags.num_attention_heads
    flags.max_position_embeddings = flags.max_position_embeddings or flags.seq_length
    flags.vocab_size = flags.vocab_size or VOCABULARIES.get(flags.tokenizer_type, VOCABULARY)
