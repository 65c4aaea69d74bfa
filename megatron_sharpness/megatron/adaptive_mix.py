"""``--adaptive-mix`` in Megatron: training data whose mix follows the measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, training

from megatron_sharpness.adaptive_mix.adaptive import FLAG, AdaptiveMix, controller_of
from megatron_sharpness.adaptive_mix.mixture import Mixture, weights_at
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.megatron.hook import MIX_STATE, MeasuredTrainStep, printing_on
from megatron_sharpness.sinks import curve_sinks


class AdaptiveBlend:
    """A dataset of samples of several components, in the order that a mixture draws them.

    Args:
        parts: the components, each with as many samples as the run takes.
        mixture: which one each sample is of.
    """

    def __init__(self, parts: Sequence[Any], mixture: Mixture) -> None:
        self.parts = parts
        self.mixture = mixture

    def __len__(self) -> int:
        return min(len(part) for part in self.parts)

    def __getitem__(self, number: int) -> Any:
        component, own_number = self.mixture[number]
        return self.parts[component][own_number]


def adaptive_blend(
    prefixes: Sequence[str], weights: Sequence[float], build: Callable[[str], Any]
) -> AdaptiveBlend | None:
    """The training set that ``--adaptive-mix`` asks for, for a script's dataset provider.

    The run's one mixture follows its measurements, on every rank alike, and goes on from a
    checkpoint. Megatron must draw the samples in order and in this process.

    Args:
        prefixes, weights: of the components, as ``--data-path`` has them.
        build: makes the training set of one component, with as many samples as the run takes, or
            None on a rank that reads no data.

    Raises:
        InputError: a flag cannot be used; the message says why and what to do.
    """
    args = get_args()
    step = training.train_step
    if args.dataloader_type != "single":
        raise InputError(
            f"{FLAG}: --dataloader-type {args.dataloader_type} has an order of its own; leave it "
            "out."
        )
    args.num_workers = 0  # workers would have read ahead, with the mix of before
    controller = controller_of(args, weights)
    assert isinstance(step, MeasuredTrainStep)  # as the controller has seen
    if step.mix is None:  # each virtual pipeline stage asks for its own set
        sinks = curve_sinks(get_tensorboard_writer(), get_wandb_writer())
        say = printing_on(dist.get_world_size() - 1)
        mixture = Mixture(weights_at(controller.share, weights[1:]), args.seed)
        step.mix = AdaptiveMix(controller, mixture, sinks, say)
        if state := getattr(args, MIX_STATE, {}):
            step.mix.load_state_dict(state)
            say(f" data mix goes on with a share of the first component of {controller.share:.4f}")
    parts = [build(prefix) for prefix in prefixes]
    return None if None in parts else AdaptiveBlend(parts, step.mix.mixture)
