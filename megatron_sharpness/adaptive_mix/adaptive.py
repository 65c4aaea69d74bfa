"""``--adaptive-mix``: a training mix that follows the losses which break first.

For training scripts that draw their samples by a :class:`~megatron_sharpness.adaptive_mix.mixture.
Mixture`, as this repository's do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_sharpness.adaptive_mix.controller import MixController
from megatron_sharpness.adaptive_mix.mixture import Mixture, weights_at
from megatron_sharpness.core.errors import InputError, SettingError
from megatron_sharpness.core.measurement import Measurement, Scalars, relative_sharpness

FLAG = "--adaptive-mix"
TAG = "data-mix-share"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to a parser, in a group of their own."""
    group = parser.add_argument_group("adaptive mix")
    group.add_argument(
        FLAG,
        nargs=2,
        metavar=("GAINS", "LOSES"),
        help="Adjust the share of the first component of --data-path so that the relative critical "
        "sharpness of these two --critical-sharpness-eval-data meets: of GAINS, which this "
        "component is good for, and of LOSES. The other components keep their proportions.",
    )
    group.add_argument(
        f"{FLAG}-every",
        type=int,
        default=5,
        metavar="K",
        help="Adjust after every K measurements, by their mean (default: %(default)s).",
    )
    group.add_argument(
        f"{FLAG}-bounds",
        type=float,
        nargs=2,
        default=[0.05, 0.95],
        metavar=("LOWER", "UPPER"),
        help="Within which the share stays (default: 0.05 0.95).",
    )
    group.add_argument(
        f"{FLAG}-rate",
        type=float,
        default=0.05,
        metavar="CHANGE",
        help="Largest change of the share at one adjustment (default: %(default)s).",
    )
    group.add_argument(
        f"{FLAG}-gain",
        type=float,
        default=0.1,
        metavar="CHANGE",
        help="Change of the share for a factor e between the two (default: %(default)s).",
    )
    return parser


class CurveSink(Protocol):
    """A logger of curves, such as :class:`~megatron_sharpness.sinks.TensorBoardSink`."""

    def write(self, measurement: Scalars) -> None: ...


@dataclass(frozen=True)
class ShareAt:
    """The share that an iteration was trained with, for a logger."""

    iteration: int
    consumed_samples: int
    share: float

    def scalars(self) -> dict[str, float]:
        return {TAG: self.share}


class AdaptiveMix:
    """A run's mixture, and the controller of its first component's share.

    Args:
        controller: of the share.
        mixture: whose weights follow it.
        sinks: where the share goes at each measurement; empty on ranks that write nothing.
        say: where a line goes at each adjustment.
    """

    def __init__(
        self,
        controller: MixController,
        mixture: Mixture,
        sinks: Sequence[CurveSink],
        say: Callable[[str], object],
    ) -> None:
        self.controller = controller
        self.mixture = mixture
        self._fixed = mixture.weights[1:]
        self._sinks = sinks
        self._say = say

    def observe(self, records: Mapping[str, Measurement], consumed_samples: int) -> None:
        """Take in the records of a step, the same ones on every rank, and adjust the mixture.

        Args:
            records: by name of the data.
            consumed_samples: up to and with the step; from there on the new share holds.
        """
        controller, before = self.controller, self.controller.share
        iteration = next(iter(records.values())).iteration
        for sink in self._sinks:
            sink.write(ShareAt(iteration, consumed_samples, before))
        values = {
            name: relative_sharpness(
                record.status, record.critical_sharpness, record.critical_lr_lower
            )
            for name, record in records.items()
        }
        if not controller.observe({n: value for n, value in values.items() if value is not None}):
            return
        self.mixture.change(consumed_samples, weights_at(controller.share, self._fixed))
        self._say(
            f" data mix after iteration {iteration:8d} | share of the first component: "
            f"{before:.4f} -> {controller.share:.4f} |"
        )

    def state_dict(self) -> dict[str, Any]:
        """Controller and mixture as plain numbers, for a checkpoint."""
        return {"controller": self.controller.state_dict(), "mixture": self.mixture.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.controller.load_state_dict(state["controller"])
        self.mixture.load_state_dict(state["mixture"])


def controller_of(args: Any, weights: Sequence[float]) -> MixController:
    """The controller that the flags ask for.

    Args:
        args: parsed arguments, those of ``--measure-critical-sharpness-every`` among them.
        weights: of the components of ``--data-path``.

    Raises:
        InputError: names the flag, the value, the reason and the remedy.
    """
    shown = f"{FLAG} {' '.join(args.adaptive_mix)}"
    if not args.measure_critical_sharpness_every:
        raise InputError(
            f"{shown}: it goes by measurements; give --measure-critical-sharpness-every."
        )
    if args.critical_sharpness_frozen is not None:
        raise InputError(
            f"{shown}: --critical-sharpness-frozen trains nothing; leave one of them out."
        )
    names = [text.partition("=")[0] for text in args.critical_sharpness_eval_data]
    for name in args.adaptive_mix:
        if name not in names:
            raise InputError(
                f"{shown}: --critical-sharpness-eval-data has no {name}; it has "
                f"{', '.join(names) or 'nothing'}."
            )
    if len(set(args.adaptive_mix)) < 2:
        raise InputError(f"{shown}: this is one loss; give two.")
    if len(weights) < 2 or not sum(weights[1:]) > 0.0:
        raise InputError(
            f"{shown}: --data-path has no second component; give a mix, WEIGHT PREFIX WEIGHT "
            "PREFIX …"
        )
    gains, loses = args.adaptive_mix
    lower, upper = args.adaptive_mix_bounds
    try:
        return MixController(
            weights[0] / sum(weights),
            gains,
            loses,
            every=args.adaptive_mix_every,
            lower=lower,
            upper=upper,
            rate=args.adaptive_mix_rate,
            gain=args.adaptive_mix_gain,
        )
    except SettingError as error:
        flags = {"share": "--data-path", "lower": f"{FLAG}-bounds", "upper": f"{FLAG}-bounds"}
        flag = flags.get(error.name, f"{FLAG}-{error.name}")
        raise InputError(f"{flag} {error.value}: {error.reason}.") from None
