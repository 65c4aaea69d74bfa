"""``megatron-sharpness estimate``: what measuring would cost a Megatron run, before it is made.

The model counts bytes, and takes a forward pass as given::

    probe        =  forward + write + gather
    measurement  =  snapshot + products + passes · probe + restore
    overhead     =  measurement / (interval · iteration)

A part of a measurement takes as long as its bytes at the bandwidth that is stated. Left out is what
does not grow with the model: latencies of kernels and collectives, random states, the reduction of
the loss. ``benchmarks/growth.py`` compares the model with measurements.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_sharpness.errors import InputError

#: Defaults of the command's flags. A copy reaches about 80 % of the 3350 GB/s of an H100 SXM, one
#: 400 Gb/s adapter for each GPU brings 50 GB/s, and a dense model computes 40 % of the peak. In
#: a long training the certified search takes so many passes: benchmarks/passes.py has 2.56 from the
#: last step's η_c, and benchmarks/training.py 2.5 from that of 100 iterations before.
MEMORY_BANDWIDTH = 2680.0
NETWORK_BANDWIDTH = 50.0
TFLOPS = 400.0
PASSES = 2.6
INTERVALS = (10, 100, 1000)

#: Bytes a second between a GPU and the pinned memory of its host, where offloaded copies lie.
HOST_BANDWIDTH = 25e9

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


@dataclass(frozen=True)
class Cost:
    """Seconds of the parts of a measurement, and its forward passes.

    Attributes:
        forward: a forward-only pass over the global batch.
        write: θ(η) into the model.
        gather: how long a probe waits for the other ranks' parameters.
        snapshot: θ_t kept.
        products: the slope and the norm of the update.
        restore: θ_{t+1} back into the model, and gathered.
        passes: probes of a measurement.
    """

    forward: float
    write: float
    gather: float
    snapshot: float
    products: float
    restore: float
    passes: float

    @property
    def probe(self) -> float:
        """Seconds: forward + write + gather."""
        return self.forward + self.write + self.gather

    @property
    def measurement(self) -> float:
        """Seconds: snapshot + products + passes · probe + restore."""
        return self.snapshot + self.products + self.passes * self.probe + self.restore

    def overhead(self, every: int, iteration: float) -> float:
        """measurement / (every · iteration), with the seconds of an ``iteration``."""
        return self.measurement / (every * iteration)


def cost(
    run: Run, forward: float, *, memory_bandwidth: float, network_bandwidth: float, passes: float
) -> Cost:
    """What a measurement takes. In bytes read and written for each owned parameter, with m bytes of
    the model's own::

        snapshot 8 · copies    products 180    write 8 + m    restore 4 + m

    (the products are 25 operations in fp32, counted as if none found its operands in a cache) over
    the memory bandwidth, and 4 · copies more over the host's where the copies are offloaded
    (restore: 4 · (copies − 1)). The restored parameters are gathered once too.

    Args:
        run: the run.
        forward: seconds of a forward-only pass over the global batch.
        memory_bandwidth: bytes read and written a second.
        network_bandwidth: bytes a second that an all-gather brings a rank.
        passes: probes of a measurement.
    """

    def seconds(moved: int, copies: int) -> float:
        offloaded = 4 * copies * run.owned / HOST_BANDWIDTH if run.offloads else 0.0
        return moved * run.owned / memory_bandwidth + offloaded

    gather = run.gathered / network_bandwidth
    return Cost(
        forward=forward,
        write=seconds(8 + run.model_bytes, run.copies),
        gather=exposed_gather(run, forward, gather),
        snapshot=seconds(8 * run.copies, run.copies),
        products=seconds(180, run.copies),
        restore=seconds(4 + run.model_bytes, run.copies - 1) + gather,
        passes=passes,
    )


def exposed_gather(run: Run, forward: float, gather: float) -> float:
    """Seconds that a probe waits for a gather of ``gather`` seconds.

    All of it, where it comes before the pass. Overlapped, the first micro-batch f on a stage hides
    it, and the p stages meet their first micro-batch one after the other: p · max(0, gather − f),
    with f = forward/(m + p − 1) for m micro-batches.
    """
    if not run.overlaps:
        return gather
    first = forward / (run.micro_batches + run.stages - 1)
    return run.stages * max(0.0, gather - first)


def forward_seconds(run: Run, tflops: float) -> float:
    """flops/(gpus · tflops · 10¹²) · (m + p − 1)/m for m micro-batches through p stages."""
    bubble = (run.micro_batches + run.stages - 1) / run.micro_batches
    return run.flops / (run.gpus * tflops * 1e12) * bubble


def iteration_seconds(run: Run, forward: float) -> float:
    """3 · forward, since a backward pass is two; 4 · forward where it repeats the forward pass."""
    return (4.0 if run.recomputes else 3.0) * forward


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
        raise _bad(
            "gpus", gpus,
            f"not a multiple of {tensor * stages * context}, the tensor parallel {tensor} × "
            f"pipeline parallel {stages} × context parallel {context} of the configuration; give "
            "a multiple of it",
        )  # fmt: skip
    data = gpus // (tensor * stages * context)
    each = flags.micro_batch_size * data
    samples = flags.global_batch_size or each
    if samples % each:
        raise _bad(
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
            raise _bad(
                name, getattr(flags, name),
                f"not a multiple of {_flag(divisor)} {getattr(flags, divisor)}; give a multiple "
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
        parser.add_argument(_flag(name), type=int)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size",
                 "context_parallel_size", "num_query_groups"):  # fmt: skip
        parser.add_argument(_flag(name), type=int, default=1)
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    for name in ("group_query_attention", "multi_latent_attention", "swiglu", "disable_bias_linear",
                 "untie_embeddings_and_output_weights", "bf16", "fp16", "use_distributed_optimizer",
                 "overlap_param_gather"):  # fmt: skip
        parser.add_argument(_flag(name), action="store_true")
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
            raise InputError(f"{_flag(name)}: missing; add it to the configuration")
    for name in ("num_experts", "multi_latent_attention"):
        if getattr(flags, name):
            raise _bad(
                name, getattr(flags, name),
                "the estimate counts the parameters of dense models with plain attention only; "
                "measure such a run instead, its log has the seconds",
            )  # fmt: skip
    for name, value in vars(flags).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise _bad(name, value, "must be at least 1; give such a number")


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``megatron-sharpness estimate``."""
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="PATH",
        help="a file of Megatron's flags, as in configs/",
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="of the whole run")
    parser.add_argument(
        "--forward-seconds",
        type=float,
        metavar="S",
        help="seconds of a forward-only pass over the global batch (default: from --tflops)",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=TFLOPS,
        metavar="X",
        help="TFLOP/s that a GPU achieves in the forward pass (default: %(default)g)",
    )
    parser.add_argument(
        "--iteration-seconds",
        type=float,
        metavar="S",
        help="seconds of a training iteration (default: three forward passes, four under full "
        "recomputation)",
    )
    parser.add_argument(
        "--memory-bandwidth",
        type=float,
        default=MEMORY_BANDWIDTH,
        metavar="GB/S",
        help="read and written by a copy (default: %(default)g, an H100 SXM)",
    )
    parser.add_argument(
        "--network-bandwidth",
        type=float,
        default=NETWORK_BANDWIDTH,
        metavar="GB/S",
        help="that an all-gather brings a GPU (default: %(default)g, one 400 Gb/s adapter each)",
    )
    parser.add_argument(
        "--passes",
        type=float,
        default=PASSES,
        metavar="X",
        help="forward passes of a search in the mean (default: %(default)g, the certified search "
        "every 100 iterations)",
    )
    parser.add_argument(
        "--every",
        type=int,
        nargs="+",
        default=INTERVALS,
        metavar="N",
        help=f"intervals of measurements (default: {' '.join(map(str, INTERVALS))})",
    )
    parser.add_argument(
        "--critical-sharpness-offload",
        choices=["none", "cpu"],
        help="where the copies lie (default: as in the configuration, or none)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the estimate."""
    for name, value in vars(arguments).items():
        for number in value if name == "every" else [value]:
            if isinstance(number, int | float) and not 0 < number < math.inf:
                raise _bad(name, number, "must be positive and finite; give such a number")
    flags = _read(arguments.config)
    if arguments.critical_sharpness_offload:
        flags.critical_sharpness_offload = arguments.critical_sharpness_offload
    planned = plan(flags, arguments.gpus)
    forward = arguments.forward_seconds or forward_seconds(planned, arguments.tflops)
    estimate = cost(
        planned,
        forward,
        memory_bandwidth=arguments.memory_bandwidth * 1e9,
        network_bandwidth=arguments.network_bandwidth * 1e9,
        passes=arguments.passes,
    )
    iteration = arguments.iteration_seconds or iteration_seconds(planned, forward)
    print(f"{arguments.config} on {arguments.gpus} GPUs\n")
    for name, text in _rows(planned, estimate, iteration, arguments.every):
        print(f"  {name:<22}{text}")
    print("\nAssumed: " + ";\n         ".join(_assumptions(arguments, flags, planned)) + ".")


def _read(path: Path) -> argparse.Namespace:
    try:
        words = split(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _bad("config", path, f"cannot be read ({reason}); name a file of Megatron's flags") \
            from error  # fmt: skip
    try:
        return parse_flags(words)
    except InputError as error:
        raise InputError(f"--config {path}: {error}") from None


def _rows(
    planned: Run, estimate: Cost, iteration: float, intervals: Sequence[int]
) -> list[tuple[str, str]]:
    place = "in host memory, for each GPU" if planned.offloads else "on each GPU"
    return [
        ("layout", f"tensor {planned.tensor} × pipeline {planned.stages} × context "
                   f"{planned.context} × data {planned.data}, {planned.micro_batches} "
                   "micro-batches"),
        ("parameters", f"{planned.parameters / 1e9:.3f} billion"),
        ("of them a GPU holds", f"{planned.share / 1e6:,.1f} million, and steps "
                                f"{planned.owned / 1e6:,.1f} million"),
        ("forward pass", f"{estimate.forward:.3f} s"),
        ("training iteration", f"{iteration:.3f} s"),
        ("probe", f"{estimate.probe:.3f} s = {estimate.probe / estimate.forward:.3f} × the forward "
                  f"pass (write {1e3 * estimate.write:.1f} ms, gather "
                  f"{1e3 * estimate.gather:.1f} ms)"),
        ("measurement", f"{estimate.measurement:.3f} s = {estimate.passes:g} probes, snapshot "
                        f"{1e3 * estimate.snapshot:.1f} ms, products "
                        f"{1e3 * estimate.products:.1f} ms, restore "
                        f"{1e3 * estimate.restore:.1f} ms"),
        *((f"overhead, every {every}", f"{estimate.overhead(every, iteration):.2%}")
          for every in intervals),
        ("extra memory", f"{planned.memory / 2**20:,.0f} MiB {place}, during a measurement"),
    ]  # fmt: skip


def _assumptions(
    arguments: argparse.Namespace, flags: argparse.Namespace, planned: Run
) -> list[str]:
    lines = [
        f"a vocabulary of {flags.vocab_size} before padding",
        f"{arguments.memory_bandwidth:g} GB/s of memory, {arguments.network_bandwidth:g} GB/s into "
        "a GPU in an all-gather",
        f"{arguments.passes:g} passes a search; a run's first measurement makes one or two more",
    ]
    if arguments.forward_seconds is None:
        lines.append(f"the forward pass at {arguments.tflops:g} TFLOP/s a GPU")
    if arguments.iteration_seconds is None:
        lines.append(f"an iteration of {iteration_seconds(planned, 1.0):g} forward passes")
    if planned.overlaps:
        lines.append("gathers hidden behind the first micro-batch of each stage")
    if planned.offloads:
        lines.append(f"{HOST_BANDWIDTH / 1e9:g} GB/s between a GPU and its host")
    return lines


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _bad(name: str, value: object, reason: str) -> InputError:
    return InputError(f"{_flag(name)} {value}: {reason}.")
