"""What a run's curve says of its learning rate, in words, by rules that are stated.

The rules are ours, not the paper's. η/η_c orders learning rates, and the loss tells what a high one
has done. experiments/learning_rate counts how often they are right. The first that fits is the
verdict:

- ``DIVERGED``: the loss is not finite in the end, or at ``MANY`` of the measurements; or its level
  has once been ``LOST`` times the lowest before or more, and half of the fall until there was lost;
  or half is lost in the end, and the level ``BACK`` times the lowest or more, and above it by four
  scatters. A level is the median of ``LEVEL`` values in a row, a spike of one value being no
  divergence, and the last value.
- ``TOO_FEW``: fewer than ``LEAST`` measurements of the stable phase tell η/η_c.
- the last of ``LEAST_RATIO`` that the median of η/η_c in the stable phase reaches.

The stable phase is where the learning rate is within 10 % of its peak; a schedule that only
decays has a short one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_sharpness.core.errors import reason_of
from megatron_sharpness.report.phases import AT_PEAK, Phase, phases_of, stable_phase
from megatron_sharpness.report.records import Array, Run, read_records
from megatron_sharpness.report.stages import scatter_of
from megatron_sharpness.sinks import ConsoleSink, JsonLinesSink

DIVERGED = "diverged"
TOO_FEW = "too few measurements to tell"
FAR_TOO_LOW = "learning rate far too low"
LOW = "room for a higher learning rate"
USUAL = "learning rate in the usual range"
HIGH = "learning rate at the upper end of the usual range"
TOO_HIGH = "learning rate likely too high"
AT_THE_EDGE = "at the edge of stability"
ABOVE = "above the edge of stability"

#: The median η/η_c in the stable phase from which on each is said.
LEAST_RATIO = {
    FAR_TOO_LOW: 0.0,
    LOW: 0.03,
    USUAL: 0.1,
    HIGH: 0.33,
    TOO_HIGH: 0.55,
    AT_THE_EDGE: 0.83,
    ABOVE: 1.2,
}
LOST, BACK = 2.0, 1.2
LEVEL = 3
LEAST, SCATTERED = 5, 20

#: Statuses that tell nothing of η/η_c, and what helps.
NO_ANSWER = {
    "noise_limited": "a batch with more tokens would have less noise",
    "exhausted": "allow more forward passes",
    "skipped_step": "the optimizer has skipped these steps",
    "failed": "their records have the reason",
}
#: What is said to be many: of the measurements without a number; and few: tokens of a batch.
MANY, FEW_TOKENS = 0.2, 4096

#: The rules in a sentence each, for readers.
RULES = {
    DIVERGED: f"The loss is not finite in the end, or at {MANY:.0%} of the measurements; or its "
    f"level, the median of {LEVEL} values in a row, was once {LOST:g} times the lowest before or "
    "more, with half of the fall until there lost; or in the end half of the fall is lost, and "
    f"the level {BACK:g} times the lowest or more, and above it by four scatters.",
    **{
        name: f"η/η_c is at {least:g} to {below:g}."
        for (name, least), (_, below) in pairwise(LEAST_RATIO.items())
    },
    ABOVE: f"η/η_c is {LEAST_RATIO[ABOVE]:g} or more: steps raise the loss of their own batch.",
}
RULES[AT_THE_EDGE] += (
    " Training on the full batch comes there at any learning rate; on mini-batches it is too high."
)
#: And what they are of.
RULE = (
    "The first that fits. η/η_c is its median in the stable phase, where the learning rate is "
    f"within {1.0 - AT_PEAK:.0%} of its peak, of {LEAST} measurements or more. The limits were "
    "chosen on small language models; smaller batches have their best learning rate at a lower "
    "η/η_c, and larger ones at a higher."
)


@dataclass(frozen=True)
class Verdict:
    """What is said of a run.

    Attributes:
        name: ``DIVERGED``, ``TOO_FEW`` or one of ``LEAST_RATIO``.
        sentences: why, and what else there is to know, a line each.
    """

    name: str
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"verdict: {self.name}", *(f"  {line}" for line in self.sentences)])


def verdict_of(run: Run) -> Verdict:
    """The verdict on a run."""
    stable = stable_phase(run)
    divergence = _divergence(run)
    name = _name(stable) if divergence is None else DIVERGED
    told = [] if divergence is None else [divergence]
    told += [_of_phase(phase) for phase in phases_of(run) if len(phase.ratios)]
    told += [*_of_few(name, stable), *_of_scatter(name, stable), *_of_trust(run)]
    return Verdict(name, tuple(told))


def _name(stable: Phase | None) -> str:
    if stable is None or len(stable.ratios) < LEAST:
        return TOO_FEW
    return _called(stable.median)


def _called(ratio: float) -> str:
    return [name for name, least in LEAST_RATIO.items() if ratio >= least][-1]


def last_loss(run: Run) -> float:
    """The level of the loss in the end; NaN where it is not known."""
    loss = run.curve("loss").values
    loss = loss[np.isfinite(loss)]
    return float(np.median(loss[-LEVEL:])) if len(loss) else math.nan


def _divergence(run: Run) -> str | None:
    """How the loss has diverged, or None."""
    curve = run.curve("loss")
    if (lost := _not_finite(run)) is not None:
        return lost
    there = np.isfinite(curve.values)
    iteration, loss = curve.iteration[there], curve.values[there]
    if not len(loss):
        return None
    middle = LEVEL // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(loss, middle, mode="edge"), LEVEL)
    level = np.append(np.median(windows, axis=-1), loss[-1])
    lowest = np.minimum(np.minimum.accumulate(level), loss[0])
    half = 0.5 * (loss[0] - lowest)
    lost_half = level - lowest >= half
    doubled = lost_half & (level >= LOST * lowest) & (lowest > 0.0)
    if doubled.any():
        worst = int(np.argmax(np.where(doubled, level / np.where(doubled, lowest, 1.0), 0.0)))
    elif lost_half[-2] and half[-2] > 0.0 and _stands_out(level[-2], lowest[-2], loss):
        worst = len(level) - 2
    else:
        return None
    return (
        f"the loss has risen from {lowest[worst]:.3g} to {level[worst]:.3g} by iteration "
        f"{np.append(iteration, iteration[-1])[worst]:g} (medians of {LEVEL} values); in the end "
        f"it is {loss[-1]:.3g}"
    )


def _not_finite(run: Run) -> str | None:
    """That the loss is not finite in the end, or was not at many measurements."""
    curve = run.curve("loss")
    if "loss" in run.logged.curves and not np.isfinite(curve.values[-1]):
        return f"the loss is not finite at iteration {curve.iteration[-1]:g}"
    told = [r for r in run.records if r["status"] not in NO_ANSWER]
    lost = [r["iteration"] for r in told if r["status"] == "non_finite"]
    if lost and (told[-1]["status"] == "non_finite" or len(lost) >= MANY * len(told)):
        return (
            f"the loss was not finite at {len(lost)} of {len(told)} measurements, first at "
            f"iteration {lost[0]}"
        )
    return None


def _stands_out(last: float, lowest: float, loss: Array) -> bool:
    """Whether a loss in the end is above its lowest by more than it scatters."""
    return bool(last - lowest > max((BACK - 1.0) * lowest, 4.0 * scatter_of(loss)))


def _of_phase(phase: Phase) -> str:
    """How near to the critical learning rate the steps of a phase were."""
    said = (
        f"{phase.name} (iterations {phase.first} to {phase.last}): η/η_c is "
        f"{_digits(phase.median)} in the median, {_digits(phase.largest)} at most"
    )
    if 0.0 < phase.median < 1.0:
        said += f"; one step could have been {_digits(1.0 / phase.median, 2)} times as long"
    number = len(phase.ratios)
    if phase.raised:
        said += f"; {phase.raised} of {number} measured steps raised the loss of their own batch"
    if never := int((phase.ratios == 0.0).sum()):
        said += f"; along {never} of {number} updates the loss never rises"
    return said


def _digits(value: float, digits: int = 3) -> str:
    return f"{float(f'{value:.{digits}g}'):g}" if math.isfinite(value) else "infinite"


def _of_few(name: str, stable: Phase | None) -> Iterator[str]:
    """Why there is no verdict."""
    if name == TOO_FEW:
        number = 0 if stable is None else len(stable.ratios)
        yield (
            f"{LEAST} measurements that tell η/η_c are needed where the learning rate is within "
            f"{1.0 - AT_PEAK:.0%} of its peak, and there are {number}: measure more often"
        )


def _of_scatter(name: str, stable: Phase | None) -> Iterator[str]:
    """How far single values are from the median, and that from the limits."""
    if stable is None or name not in LEAST_RATIO:
        return
    logs = np.log(stable.ratios[(stable.ratios > 0.0) & np.isfinite(stable.ratios)])
    if len(logs) < LEAST:
        return
    uncertain = 1.25 * float(np.std(logs, ddof=1)) / len(logs) ** 0.5  # of a median, in logarithms
    factor = math.exp(uncertain)
    others = {_called(stable.median * factor), _called(stable.median / factor)} - {name}
    if others:
        yield (
            f"the median is known to a factor of {_digits(factor, 2)}, so that it may as well be: "
            f"{', or '.join(sorted(others))}"
        )
    scatter = math.exp(scatter_of(logs))
    if len(logs) >= SCATTERED and scatter >= 1.2:
        yield (
            f"a single value lies off the median by a factor of {_digits(scatter, 2)} (one "
            "standard deviation); in batches of four times the tokens it would be about "
            f"{_digits(math.sqrt(scatter), 2)}"
        )


def _of_trust(run: Run) -> Iterator[str]:
    """What makes the verdict weak."""
    number = len(run.records)
    for status, remedy in NO_ANSWER.items():
        if (count := run.statuses.get(status, 0)) >= MANY * number:
            yield f"{count} of {number} measurements ended {status}: {remedy}"
    tokens = run.column("tokens")
    if np.isfinite(tokens).any() and (few := np.nanmedian(tokens)) < FEW_TOKENS:
        yield (
            f"a batch has {few:g} tokens, which is few: the best η/η_c is lower for small batches, "
            "so compare with runs of the same"
        )


def log_verdict(sinks: Sequence[object]) -> None:
    """The verdict in the log of a training that has ended, where JSON lines were written too.

    It is read from them, so that it is of the whole run where that was resumed.
    """
    files = [sink.path for sink in sinks if isinstance(sink, JsonLinesSink) and sink.path.is_file()]
    logs = [sink.print_line for sink in sinks if isinstance(sink, ConsoleSink)]
    if not files or not logs:
        return
    try:
        said = str(verdict_of(Run(files[0].stem, read_records(files[0]))))
    except Exception as error:  # whatever it is, the run ends as it would
        said = f"no verdict ({reason_of(error)})"
    for line in said.splitlines():
        logs[0](f" critical sharpness: {line}")
