"""The flags of ``launch/fsdp/train.py``: Megatron's where Megatron has them."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

import torch

from fsdp import data
from fsdp.gpt import GPTConfig
from megatron_sharpness import arguments
from megatron_sharpness.adaptive_mix import adaptive
from megatron_sharpness.core.errors import InputError, bad_flag, flag_of
from megatron_sharpness.core.trial import Trial
from megatron_sharpness.data.tokenize import VOCAB_SIZE

DESCRIPTION = "Pretrain a plain GPT, or any Hugging Face causal language model, with FSDP2."

#: Flags of Megatron's that lay out memory and communication, choose its kernels, or evaluate. They
#: may stand in a configuration that both scripts read; here they do nothing, which is said.
WITHOUT_MEANING = [
    *("--eval-interval", "--eval-iters", "--overlap-grad-reduce", "--overlap-param-gather"),
    *("--pipeline-model-parallel-size", "--recompute-activations", "--recompute-method"),
    *("--recompute-num-layers", "--sequence-parallel", "--tensor-model-parallel-size"),
    *("--tokenizer-type", "--transformer-impl", "--use-distributed-optimizer"),
]


class Parser(argparse.ArgumentParser):
    """Raises what is wrong, for the script to say it once a node."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked, with ``rank`` and ``world_size``.

    Raises:
        InputError: names the flag, the value, the reason and the remedy.
    """
    parser = Parser(description=DESCRIPTION, allow_abbrev=False)

    model = parser.add_argument_group("model: a plain GPT", "Defaults are Megatron's.")
    for flag in ("--num-layers", "--hidden-size", "--num-attention-heads", "--ffn-hidden-size"):
        model.add_argument(flag, type=int, metavar="N")
    model.add_argument("--max-position-embeddings", type=int, metavar="N", help="of --seq-length")
    model.add_argument("--vocab-size", type=int, metavar="N", help=f"{VOCAB_SIZE}: bytes")
    model.add_argument("--position-embedding-type", choices=["learned_absolute", "rope"])
    model.add_argument("--normalization", choices=["LayerNorm", "RMSNorm"])
    for flag in ("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"):
        model.add_argument(flag, action="store_true", default=None)
    for flag in ("--rotary-base", "--norm-epsilon", "--init-method-std", "--attention-dropout",
                 "--hidden-dropout"):  # fmt: skip
        model.add_argument(flag, type=float, metavar="X")
    model = parser.add_argument_group("model: Hugging Face")
    model.add_argument(
        "--hf-model",
        metavar="NAME_OR_FOLDER",
        help="a causal language model instead of the GPT; random weights where the folder holds "
        "config.json and no weights, bytes as tokens where it holds no tokenizer",
    )
    model.add_argument("--hf-revision", metavar="R", help="branch, tag or commit on the hub")

    data.add_arguments(parser)

    group = parser.add_argument_group("training")
    for flag in ("--seq-length", "--micro-batch-size"):
        group.add_argument(flag, type=int, required=True, metavar="N")
    group.add_argument(
        "--train-iters",
        type=int,
        required=True,
        metavar="N",
        help="iterations in all, those before a --load too; without --lr-decay-iters the schedule "
        "of the learning rate is as long, so that going on with a larger N raises a rate that has "
        "decayed",
    )
    group.add_argument("--global-batch-size", type=int, metavar="N")
    group.add_argument("--optimizer", choices=["adam"], default="adam", help="AdamW")
    group.add_argument("--exit-interval", type=int, metavar="N", help="end where N divides")
    group.add_argument("--lr", type=float, required=True)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--lr-warmup-iters", type=int, default=0, metavar="N")
    group.add_argument(
        "--lr-decay-iters",
        type=int,
        metavar="N",
        help="length of the schedule of the learning rate, its warmup included (default: "
        "--train-iters); to go on with a larger --train-iters by the same schedule, give the N "
        "that it had",
    )
    group.add_argument(
        "--lr-decay-style", choices=["constant", "linear", "cosine", "WSD"], default="linear"
    )
    group.add_argument("--lr-wsd-decay-iters", type=int, metavar="N")
    group.add_argument(
        "--lr-wsd-decay-style",
        choices=["exponential", "linear", "cosine", "minus_sqrt"],
        default="exponential",
    )
    group.add_argument("--weight-decay", type=float, default=0.01, help="of matrices")
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.999)
    group.add_argument("--adam-eps", type=float, default=1e-8)
    group.add_argument("--clip-grad", type=float, default=1.0, help="0: not clipped")
    group.add_argument("--seed", type=int, default=1234, help="of weights, dropout and data order")
    group.add_argument("--bf16", action="store_true", help="forward and backward passes in bf16")
    group.add_argument("--attention-backend", choices=["auto", "flash"], default="auto")
    group.add_argument(
        "--recompute-granularity",
        choices=["full", "selective"],
        help="full: recompute each layer in the backward pass (attention always is)",
    )
    group.add_argument(
        "--fsdp-cpu-offload",
        action="store_true",
        help="keep parameters, gradients and optimizer in host memory between their uses",
    )
    for flag in WITHOUT_MEANING:
        group.add_argument(flag, nargs="?", const="", help=argparse.SUPPRESS)

    group = parser.add_argument_group("logs and checkpoints")
    group.add_argument("--log-interval", type=int, default=100, metavar="N")
    group.add_argument("--tensorboard-dir", metavar="FOLDER")
    group.add_argument("--tensorboard-log-interval", type=int, default=1, metavar="N")
    group.add_argument("--save", metavar="FOLDER", help="at --save-interval and in the end")
    group.add_argument("--save-interval", type=int, metavar="N")
    group.add_argument("--load", metavar="FOLDER", help="go on from the latest checkpoint, if any")
    group.add_argument(
        "--ckpt-step", type=int, metavar="N", help="of --load take the checkpoint of iteration N"
    )
    group.add_argument(
        "--exit-on-missing-checkpoint",
        action="store_true",
        help="refuse a --load without a checkpoint",
    )
    group.add_argument(
        "--use-checkpoint-opt_param-scheduler",
        action="store_true",
        help="take the learning-rate schedule of the checkpoint, and not that of the flags",
    )
    group.add_argument(
        "--finetune", action="store_true", help="of --load take the weights alone, and begin anew"
    )

    adaptive.add_arguments(arguments.add_arguments(parser))
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        raise InputError(
            "no process group: start this with `torchrun --nproc-per-node N`, N=1 for one process"
        )
    args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if (trial := Trial.asked_for()) is not None:
        arguments.as_trial(args, trial)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Fill in defaults that depend on other flags, and refuse what cannot be trained with."""
    given = {f.name: getattr(args, f.name) for f in fields(GPTConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    shape = ("num_layers", "hidden_size", "num_attention_heads")
    if args.hf_model:
        for name, value in given.items():
            raise bad_flag(
                name, value, "--hf-model has a configuration of its own; change that, or leave "
                "the flag out"
            )  # fmt: skip
    for name in () if args.hf_model else shape:
        if name not in given:
            raise InputError(f"{flag_of(name)}: missing; the GPT needs it, --hf-model does not")
    args.lr_decay_iters = args.lr_decay_iters or args.train_iters
    each_step = args.micro_batch_size * args.world_size
    args.global_batch_size = args.global_batch_size or each_step
    for name in (*shape, "ffn_hidden_size", "seq_length", "micro_batch_size", "train_iters",
                 "global_batch_size", "log_interval", "tensorboard_log_interval", "save_interval",
                 "exit_interval", "ckpt_step",
                 "lr_decay_iters", "lr_wsd_decay_iters", "max_position_embeddings",
                 "vocab_size"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 1:
            raise bad_flag(name, value, "must be at least 1")
    if args.global_batch_size % each_step:
        raise bad_flag(
            "global_batch_size", args.global_batch_size,
            f"not a multiple of --micro-batch-size {args.micro_batch_size} times "
            f"{args.world_size} processes; give {each_step} or a multiple of it",
        )  # fmt: skip
    if args.lr_warmup_iters >= args.lr_decay_iters:
        raise bad_flag(
            "lr_warmup_iters", args.lr_warmup_iters,
            f"must be less than --lr-decay-iters {args.lr_decay_iters}",
        )  # fmt: skip
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
        raise bad_flag("lr_decay_style", "WSD", "needs --lr-wsd-decay-iters too")
    if not args.hf_model:
        args.gpt = GPTConfig(**{"max_position_embeddings": args.seq_length, **given})
        if args.gpt.hidden_size % (2 * args.gpt.num_attention_heads):
            raise bad_flag(
                "hidden_size", args.gpt.hidden_size,
                "each head needs the same, even number of channels; give a multiple of twice "
                f"--num-attention-heads {args.gpt.num_attention_heads}",
            )  # fmt: skip
        check_sequence(args, args.gpt.max_position_embeddings, args.gpt.attention_dropout)
    data.check_arguments(args)
    if args.tensorboard_dir and importlib.util.find_spec("tensorboard") is None:
        raise bad_flag(
            "tensorboard_dir", args.tensorboard_dir,
            "tensorboard is not installed; pip install tensorboard, or leave the flag out",
        )  # fmt: skip
    arguments.settings_of(args)
    args.evaluation_data = arguments.check_evaluation(args, args.micro_batch_size * args.world_size)
    if args.adaptive_mix:
        parts = data.components(args) if args.data_path else []
        args.mix_controller = adaptive.controller_of(args, [weight for _, weight in parts])
    arguments.check_log_is_writable(args, writer=0)


def check_sequence(args: argparse.Namespace, positions: int | None, dropout: float) -> None:
    """Refuse what a model with these positions and this attention dropout cannot be."""
    if positions is not None and args.seq_length > positions:
        raise bad_flag("seq_length", args.seq_length, f"the model has {positions} positions only")
    if args.attention_backend == "flash" and torch.cuda.is_available() and not args.bf16:
        raise bad_flag(
            "attention_backend", "flash", "on CUDA it computes in 16 bits; give --bf16 too"
        )
    if args.attention_backend == "flash" and dropout and not torch.cuda.is_available():
        raise bad_flag(
            "attention_backend", "flash", f"on the CPU it has no dropout, and --attention-dropout "
            f"is {dropout}; give --attention-dropout 0, or leave --attention-backend out"
        )  # fmt: skip
