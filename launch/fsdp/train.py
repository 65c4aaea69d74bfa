"""Pretrain a plain GPT, or any Hugging Face causal language model, with PyTorch's own FSDP2.

Flags that Megatron-LM has too have its names, meanings and defaults. Started by torchrun, on CUDA
devices over NCCL or on the CPU over gloo:

    torchrun --nproc-per-node 2 launch/fsdp/train.py --python-docs prose --num-layers 4 …
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package `fsdp` is

from fsdp import data
from fsdp.arguments import WITHOUT_MEANING, parse_arguments
from fsdp.checkpoint import check_folders, load_checkpoint, save_checkpoint
from fsdp.model import attention, build_model, shard
from fsdp.schedule import changed_schedule, learning_rate
from megatron_sharpness import arguments
from megatron_sharpness.adaptive_mix.adaptive import AdaptiveMix
from megatron_sharpness.core.errors import InputError, SettingError
from megatron_sharpness.core.frozen import FrozenRun
from megatron_sharpness.core.trial import Trial
from megatron_sharpness.data import evaluation
from megatron_sharpness.data.evaluation import EvaluationSet
from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.pytorch.trial import TrialSharpness
from megatron_sharpness.sinks import ConsoleSink, JsonLinesSink, curve_sinks

#: A target that does not count, for ``cross_entropy``.
IGNORED = -100

Samples = data.Samples | data.Blend | data.Stream


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; biases and the scales of normalizations are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1]},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=args.lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
        weight_decay=args.weight_decay,
    )


def micro_batches(
    args: argparse.Namespace, samples: Samples, consumed: int, vocabulary: int
) -> Iterator[Tensor]:
    """This rank's part of the global batch after ``consumed`` samples; tokens [micro, length+1]."""
    size = args.micro_batch_size
    for start in range(0, args.global_batch_size, size * args.world_size):
        first = consumed + start + args.rank * size
        tokens = torch.stack([torch.from_numpy(samples[first + i]) for i in range(size)])
        if (largest := int(tokens.max())) >= vocabulary:
            raise InputError(
                f"--vocab-size {vocabulary}: the data holds token {largest}; give the vocabulary "
                "that it was tokenized with, or the model of that tokenizer"
            )
        yield tokens


def loss_sum(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    """Sum of the cross-entropies in nats, and how many they are."""
    targets = tokens[:, 1:]
    return cross_entropy_sum(model, tokens[:, :-1], targets), targets.numel()


def cross_entropy_sum(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies in nats of the targets that are not :data:`IGNORED`."""
    output = model(tokens)
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def read_evaluation(
    args: argparse.Namespace, tokenize: data.Tokenize, vocabulary: int
) -> list[EvaluationSet]:
    """The data of ``--critical-sharpness-eval-data``."""
    end = tokenize(b"").tolist()

    def without_end(text: str) -> list[int]:
        ids: list[int] = tokenize(text.encode(errors="replace")).tolist()
        return ids[: len(ids) - len(end)]

    return [
        evaluation.read(
            name,
            path,
            samples=args.critical_sharpness_eval_samples,
            length=args.seq_length,
            seed=args.seed,
            tokenize=without_end,
            end=end[0] if end else None,
            vocabulary=vocabulary,
        )
        for name, path in args.evaluation_data.items()
    ]


def answer_loss(
    args: argparse.Namespace, model: nn.Module, other: EvaluationSet, device: torch.device
) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of this rank's part of ``other`` that count, and how many."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    part = slice(args.rank, None, args.world_size)
    labels = np.where(other.mask[part] > 0, other.tokens[part, 1:], IGNORED)
    batches = zip(
        torch.from_numpy(other.tokens[part, :-1]).split(args.micro_batch_size),
        torch.from_numpy(labels).split(args.micro_batch_size),
        strict=True,
    )
    for tokens, targets in batches:
        total += cross_entropy_sum(model, tokens.to(device), targets.to(device))
    return total, int((labels != IGNORED).sum())


class TrainingLog:
    """Lines in Megatron's format and curves with its tags, on rank 0.

    Args:
        writer: TensorBoard's, or None.
    """

    def __init__(self, args: argparse.Namespace, writer: Any) -> None:
        self.args, self.writer = args, writer
        self._losses: list[float] = []
        self._since = time.perf_counter()

    def add(self, iteration: int, consumed: int, scalars: dict[str, float]) -> None:
        """One iteration; ``scalars`` are those of TensorBoard by tag."""
        self._losses.append(scalars["lm loss"])
        if self.writer is not None and iteration % self.args.tensorboard_log_interval == 0:
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, iteration)
                self.writer.add_scalar(f"{tag} vs samples", value, consumed)
        if iteration % self.args.log_interval:
            return
        elapsed = (time.perf_counter() - self._since) / len(self._losses)
        mean = sum(self._losses) / len(self._losses)
        self._losses, self._since = [], time.perf_counter()
        if self.writer is not None:
            self.writer.add_scalar("iteration-time", elapsed, iteration)
        say(
            self.args,
            f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {iteration:8d}/"
            f"{self.args.train_iters:8d} | consumed samples: {consumed:12d} | "
            f"elapsed time per iteration (ms): {elapsed * 1000:.1f} | "
            f"learning rate: {scalars['learning-rate']:.6E} | "
            f"global batch size: {self.args.global_batch_size:5d} | lm loss: {mean:.6E} | "
            f"grad norm: {scalars['grad-norm']:.3f} |",
        )


def say(args: argparse.Namespace, line: str) -> None:
    """Print on rank 0."""
    if args.rank == 0:
        print(line, flush=True)


def train(
    args: argparse.Namespace,
    model: nn.Module,
    vocabulary: int,
    samples: Samples,
    others: Sequence[EvaluationSet],
    device: torch.device,
) -> None:
    """Train, measure, log and save."""
    optimizer = build_optimizer(args, model)
    torch.manual_seed(args.seed + 1 + args.rank)  # dropout differs between ranks
    progress = load_checkpoint(args, model, optimizer)
    if line := changed_schedule(args, progress):
        say(args, line)
    writer = None
    if args.tensorboard_dir and args.rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(args.tensorboard_dir)
    log = TrainingLog(args, writer)
    losses = {
        other.name: functools.partial(answer_loss, args, model, other, device) for other in others
    }
    sharpness = build_sharpness(args, model, optimizer, losses, writer)
    if sharpness is not None and progress["critical_sharpness"] is not None:
        sharpness.load_state_dict(progress["critical_sharpness"])
    mix = build_mix(args, samples, writer)
    if mix is not None and progress.get("adaptive_mix") is not None:
        mix.load_state_dict(progress["adaptive_mix"])
    consumed = progress["consumed_samples"]
    iteration = progress["iteration"]
    tokens_per_step = args.global_batch_size * args.seq_length
    frozen = None
    if args.critical_sharpness_frozen is not None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        frozen = FrozenRun(lambda: [*trained, *model.buffers()])

    if (trial := Trial.asked_for()) is not None:
        args.exit_interval = iteration + trial.iterations
    last = iteration >= args.train_iters
    if last:
        say(args, f"  nothing to train: --train-iters {args.train_iters}, and that is reached")
    with contextlib.nullcontext() if sharpness is None else contextlib.closing(sharpness):
        while not last:
            iteration += 1
            lr = learning_rate(args, iteration)
            for group in optimizer.param_groups:
                group["lr"] = lr
            drawn = micro_batches(args, samples, consumed, vocabulary)
            batches = [tokens.to(device, non_blocking=True) for tokens in drawn]
            summed = torch.zeros((), dtype=torch.float64, device=device)
            for tokens in batches:
                loss, _ = loss_sum(model, tokens)
                (loss * args.world_size / tokens_per_step).backward()  # FSDP2 averages over ranks
                summed += loss.detach()
            dist.all_reduce(summed)
            mean = summed.item() / tokens_per_step
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if not math.isfinite(mean) or not math.isfinite(norm):
                raise RuntimeError(
                    f"iteration {iteration}: lm loss {mean}, grad norm {norm}; nothing was updated"
                )
            optimizer.step()
            optimizer.zero_grad()
            consumed += args.global_batch_size
            if sharpness is not None:

                def evaluate() -> tuple[Tensor, int]:
                    passes = [loss_sum(model, tokens) for tokens in batches]  # noqa: B023
                    losses, counts = zip(*passes, strict=True)
                    return torch.stack(losses).double().sum(), sum(counts)

                record = sharpness.after_step(
                    iteration,
                    evaluate,
                    loss=(mean * tokens_per_step, tokens_per_step),  # of all ranks, on each
                    grad_norm=norm,
                    consumed_samples=consumed,
                )
                if mix is not None and record is not None:
                    mix.observe(sharpness.records, consumed)
            log.add(
                iteration,
                consumed,
                {"lm loss": mean, "learning-rate": lr, "grad-norm": norm.item()},
            )
            last = iteration == args.train_iters
            if args.exit_interval and iteration % args.exit_interval == 0:
                say(args, f"exiting program at iteration {iteration}")
                last = True
            if args.save and (last or (args.save_interval and iteration % args.save_interval == 0)):
                save_checkpoint(args, model, optimizer, sharpness, mix, iteration, consumed)
    if frozen is not None:
        frozen.finish(lambda line: say(args, line))
    if writer is not None:
        writer.close()


def build_sharpness(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: dict[str, Any],
    writer: Any,
) -> CriticalSharpness | None:
    """What measures, or None where it is off."""
    settings = asdict(arguments.settings_of(args))
    trial = Trial.asked_for()
    if trial is None and not settings["every"] and args.critical_sharpness_frozen is None:
        return None
    log = arguments.log_path(args)
    sinks = [
        ConsoleSink(lambda line: say(args, line)),
        *([JsonLinesSink(log)] if log else []),
        *curve_sinks(writer),
    ]
    build: Any = CriticalSharpness if trial is None else functools.partial(TrialSharpness, trial)
    try:
        return build(  # type: ignore[no-any-return]
            model,
            optimizer,
            sinks=sinks,
            mode=args.critical_sharpness_mode,
            offload=args.critical_sharpness_offload,
            losses=losses,
            frozen=args.critical_sharpness_frozen,
            **settings,
        )
    except SettingError as error:
        raise arguments.as_flag(error) from None


def build_mix(args: argparse.Namespace, samples: Samples, writer: Any) -> AdaptiveMix | None:
    """What adjusts the mix of the data, or None where it is off."""
    if not args.adaptive_mix:
        return None
    assert isinstance(samples, data.Blend)
    return AdaptiveMix(
        args.mix_controller, samples.mixture, curve_sinks(writer), lambda line: say(args, line)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; what cannot be is refused before processes meet."""
    args = parse_arguments(argv)
    check_folders(args)
    built = build_model(args)
    samples = data.read_samples(args, built.tokenize)
    others = read_evaluation(args, built.tokenize, built.vocabulary)

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # Offloaded parameters are reduced where they lie.
        backend = "cpu:gloo,cuda:nccl" if args.fsdp_cpu_offload else "nccl"
        dist.init_process_group(backend, device_id=device)
    else:
        dist.init_process_group("gloo")
    say(
        args,
        f" {type(built.model).__name__} of {sum(p.numel() for p in built.model.parameters()):,} "
        f"parameters, {f'{samples.count:,}' if samples.count else 'a stream of'} samples of "
        f"{args.seq_length} tokens, {args.world_size} processes on {device.type}",
    )
    given = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in WITHOUT_MEANING}
    if ignored := [f"{flag} {value}".strip() for flag, value in given.items() if value is not None]:
        say(args, f" without meaning under FSDP2, and ignored: {', '.join(ignored)}")
    with attention(args):
        model = shard(args, built, device)
        train(args, model, built.vocabulary, samples, others, device)
    dist.destroy_process_group()
    # gloo's threads live on and let go of the last collectives' tensors with Python's lock, which
    # they can take now. In an interpreter that ends they would abort the process, its work done.
    time.sleep(0.1)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        # What all ranks refuse, the first of a node says, and torchrun then ends the others. It
        # would end the first unheard if another were faster. Who waits in vain is the only one.
        if os.environ.get("LOCAL_RANK", "0") != "0" and not dist.is_initialized():
            time.sleep(30)
        print(f"launch/fsdp/train.py: error: {error}", file=sys.stderr)
        sys.exit(1)
