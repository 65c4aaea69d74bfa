"""The learning rate of every iteration, by Megatron's rule."""

from __future__ import annotations

import argparse
import math
from typing import Any

from megatron_sharpness.core.errors import flag_of


def learning_rate(args: argparse.Namespace, iteration: int) -> float:
    """The learning rate of an iteration, counted from 1, by Megatron's rule."""
    step, warmup, end = iteration - 1, args.lr_warmup_iters, args.lr_decay_iters
    if warmup and step <= warmup:
        return float(args.lr * step / warmup)
    if args.lr_decay_style == "constant":
        return float(args.lr)
    if step > end:
        return float(args.min_lr)
    style, done = args.lr_decay_style, (step - warmup) / (end - warmup)
    if style == "WSD":
        style = args.lr_wsd_decay_style
        done = max(0.0, (step - end) / args.lr_wsd_decay_iters + 1.0)
    part = {
        "linear": 1.0 - done,
        "cosine": 0.5 * (math.cos(math.pi * done) + 1.0),
        "exponential": 2.0 * 0.5**done - 1.0,
        "minus_sqrt": 1.0 - math.sqrt(done),
    }[style]
    return float(args.min_lr + part * (args.lr - args.min_lr))


def changed_schedule(args: argparse.Namespace, progress: dict[str, Any]) -> str | None:
    """What to say where the flags lead to another learning rate than the checkpoint's schedule."""
    saved, ended = progress.get("schedule"), progress["iteration"]
    if saved is None or ended >= args.train_iters:
        return None
    theirs = argparse.Namespace(**saved)
    rate = learning_rate(args, ended + 1)
    if rate == learning_rate(theirs, ended + 1):
        return None
    flags = [
        f"{flag_of(name)} {value}"
        for name, value in saved.items()
        if value is not None and value != getattr(args, name)
    ]
    return (
        f"  learning rate of iteration {ended + 1}: {rate:.6E} by these flags; iteration {ended} "
        f"had {learning_rate(theirs, ended):.6E}. To go on with the checkpoint's schedule give "
        f"{' '.join(flags)}, or --use-checkpoint-opt_param-scheduler"
    )
