"""Checkpoints of a run, in PyTorch's distributed format.

A folder ``iter_0000100`` holds the tensors, each process's random states among them, and
``progress.json`` the numbers. As in Megatron, ``latest_checkpointed_iteration.txt`` names the
latest; it is replaced only when all else is on disk, so that a crash never loses the one before.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from megatron_sharpness.adaptive_mix.adaptive import AdaptiveMix
from megatron_sharpness.core.errors import InputError, bad_flag
from megatron_sharpness.pytorch import CriticalSharpness

TRACKER = "latest_checkpointed_iteration.txt"

#: Flags that the learning rate of an iteration follows from.
SCHEDULE = (
    *("lr", "min_lr", "lr_warmup_iters", "lr_decay_iters", "lr_decay_style"),
    *("lr_wsd_decay_iters", "lr_wsd_decay_style"),
)


def save_checkpoint(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: Optimizer,
    sharpness: CriticalSharpness | None,
    mix: AdaptiveMix | None,
    iteration: int,
    consumed: int,
) -> None:
    """Write a folder for the iteration; only when all of it is there, name it the latest."""
    folder = Path(args.save) / f"iter_{iteration:07d}"
    parameters, moments = get_state_dict(model, optimizer)
    tensors = {"model": parameters, "optimizer": moments, **_random_states(args.rank)}
    state_dict_saver.save(tensors, checkpoint_id=folder)
    if args.rank == 0:
        progress = {
            "iteration": iteration,
            "consumed_samples": consumed,
            "world_size": args.world_size,
            "schedule": {name: getattr(args, name) for name in SCHEDULE},
            "critical_sharpness": sharpness.state_dict() if sharpness else None,
            "adaptive_mix": mix.state_dict() if mix else None,
        }
        (folder / "progress.json").write_text(json.dumps(progress))
        tracker = Path(args.save) / TRACKER
        tracker.with_suffix(".new").write_text(str(iteration))
        tracker.with_suffix(".new").replace(tracker)
        print(f"  saved checkpoint {folder}", flush=True)
    dist.barrier()


def latest_checkpoint(flag: str, folder: str) -> Path | None:
    """The folder that the tracker in ``folder`` names, or None where there is no tracker."""
    tracker = Path(folder, TRACKER)
    if not tracker.exists():
        return None
    latest = Path(folder, f"iter_{tracker.read_text().strip():0>7}")
    if not (latest / "progress.json").exists():
        raise InputError(
            f"{flag} {folder}: {TRACKER} names {latest.name}, which is no checkpoint of "
            "launch/fsdp/train.py; give the folder of one, or a new one"
        )
    return latest


def checkpoint_to_load(args: argparse.Namespace) -> Path | None:
    """The folder of the checkpoint that the run goes on from, if any.

    Raises:
        InputError: there is none where one has to be.
    """
    if not args.load:
        return None
    if args.ckpt_step is None:
        found = latest_checkpoint("--load", args.load)
        if found is None and args.exit_on_missing_checkpoint:
            raise bad_flag("load", args.load, "it holds no checkpoint; give the folder of one")
        return found
    found = Path(args.load, f"iter_{args.ckpt_step:07d}")
    if not (found / "progress.json").exists():
        raise bad_flag(
            "ckpt_step", args.ckpt_step, f"--load {args.load} holds no such checkpoint; give an "
            "iteration that was saved"
        )  # fmt: skip
    return found


def check_folders(args: argparse.Namespace) -> None:
    """Refuse to load what is none of ours, and to overwrite another run's checkpoints."""
    checkpoint_to_load(args)
    if args.save and Path(args.save).resolve() != Path(args.load or os.devnull).resolve():
        held = latest_checkpoint("--save", args.save)
        if held is not None:
            raise bad_flag(
                "save", args.save, f"it holds the checkpoint {held.name}, which another run would "
                f"overwrite; go on with that one by --load {args.save}, or give another folder"
            )  # fmt: skip


def load_checkpoint(
    args: argparse.Namespace, model: nn.Module, optimizer: Optimizer
) -> dict[str, Any]:
    """Bring model, optimizer and random states to the checkpoint, and say which one that is."""
    latest = checkpoint_to_load(args)
    if latest is None:
        return {"iteration": 0, "consumed_samples": 0, "critical_sharpness": None}
    if args.finetune:
        parameters, _ = get_state_dict(model, [])
        state_dict_loader.load({"model": parameters}, checkpoint_id=latest)
        set_state_dict(model, [], model_state_dict=parameters, optim_state_dict={})
        if args.rank == 0:
            print(f"  loaded the weights of {latest}", flush=True)
        return {"iteration": 0, "consumed_samples": 0, "critical_sharpness": None}
    progress: dict[str, Any] = json.loads((latest / "progress.json").read_text())
    if args.use_checkpoint_opt_param_scheduler and "schedule" in progress:
        vars(args).update(progress["schedule"])
    flags = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    parameters, moments = get_state_dict(model, optimizer)
    states = _random_states(args.rank) if progress["world_size"] == args.world_size else {}
    tensors = {"model": parameters, "optimizer": moments, **states}
    state_dict_loader.load(tensors, checkpoint_id=latest)
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=moments)
    for group, options in zip(optimizer.param_groups, flags, strict=True):
        group.update(options)  # the command line's, not the checkpoint's
    for name, state in states.items():
        (torch.cuda if "cuda" in name else torch).set_rng_state(state)
    if args.rank == 0:
        print(f"  loaded checkpoint {latest}", flush=True)
        if not states:
            print(
                f"  random states start anew: it was saved by {progress['world_size']} processes, "
                f"and these are {args.world_size}"
            )
    return progress


def _random_states(rank: int) -> dict[str, Tensor]:
    states = {f"random_cpu_{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random_cuda_{rank}"] = torch.cuda.get_rng_state()
    return states
