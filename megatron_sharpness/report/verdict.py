"""What a run's curve says of its learning rate, in words, by rules that are stated.

The rules are ours, not the paper's. η/η_c orders learning rates, and the loss tells what a high one
has done. experiments/learning_rate counts how often they are right. The first that fits is the
verdict:

- ``DIVERGED``: the loss is not finite in the end, or its level has once been ``LOST`` times the
  lowest before or more, and half of the fall until there was lost. A level is the median of
  ``LEVEL`` values in a row, a spike of one value being no divergence, and the last value.
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
from megatron_sharpness.report.records import Run, read_records
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

#: The median η/η_c in the stable phase from which on each is said.
LEAST_RATIO = {
    FAR_TOO_LOW: 0.0,
    LOW: 0.03,
    USUAL: 0.1,
    HIGH: 0.33,
    TOO_HIGH: 0.55,
    AT_THE_EDGE: 0.83,
}
LOST = 2.0
LEVEL = 3
LEAST = 5

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
    DIVERGED: f"The loss is not finite in the end, or the median of {LEVEL} values of it in a row, "
    f"or the last one, was once {LOST:g} times the lowest before or more, with half of the fall "
    "until there lost.",
    **{
        name: f"η/η_c is at {least:g} to {below:g}."
        for (name, least), (_, below) in pairwise(LEAST_RATIO.items())
    },
    AT_THE_EDGE: f"η/η_c is {LEAST_RATIO[AT_THE_EDGE]:g} or more. Training on the full batch comes "
    "there at any learning rate; on mini-batches it is too high.",
}
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
    return Verdict(name, (*told, *_of_scatter(stable), *_of_trust(run)))


def _name(stable: Phase | None) -> str:
    if stable is None or len(stable.ratios) < LEAST:
        return TOO_FEW
    return [name for name, least in LEAST_RATIO.items() if stable.median >= least][-1]


def last_loss(run: Run) -> float:
    """The level of the loss in the end; NaN where it is not known."""
    loss = run.curve("loss").values
    loss = loss[np.isfinite(loss)]
    return float(np.median(loss[-LEVEL:])) if len(loss) else math.nan


def _divergence(run: Run) -> str | None:
    """How the loss has diverged, or None."""
    curve = run.curve("loss")
    logged = "loss" in run.logged.curves  # else NaN is what was not measured, too
    if run.records[-1]["status"] == "non_finite" or (logged and not np.isfinite(curve.values[-1])):
        return f"the loss is not finite at iteration {curve.iteration[-1]:g}"
    there = np.isfinite(curve.values)
    iteration, loss = curve.iteration[there], curve.values[there]
    if not len(loss):
        return None
    middle = LEVEL // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(loss, middle, mode="edge"), LEVEL)
    level = np.append(np.median(windows, axis=-1), loss[-1])
    lowest = np.minimum(np.minimum.accumulate(level), loss[0])
    lost = (level >= LOST * lowest) & (level - lowest >= 0.5 * (loss[0] - lowest)) & (lowest > 0.0)
    if not lost.any():
        return None
    worst = int(np.argmax(np.where(lost, level / lowest, 0.0)))
    return (
        f"the loss has risen from {lowest[worst]:.3g} to {level[worst]:.3g} by iteration "
        f"{np.append(iteration, iteration[-1])[worst]:g}; in the end it is {loss[-1]:.3g}"
    )


def _of_phase(phase: Phase) -> str:
    """How near to the critical learning rate the steps of a phase were."""
    said = (
        f"{phase.name} (iterations {phase.first} to {phase.last}): η/η_c is "
        f"{_two_digits(phase.median)} in the median, {_two_digits(phase.largest)} at most"
    )
    if 0.0 < phase.median < 1.0:
        said += f"; one step could have been {_two_digits(1.0 / phase.median)} times as long"
    if phase.raised:
        share = f"{phase.raised} of {len(phase.ratios)} measured steps"
        said += f"; {share} raised the loss of their own batch"
    return said


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}" if math.isfinite(value) else "without bound"


def _of_scatter(stable: Phase | None) -> Iterator[str]:
    """How far single values are from the level."""
    if stable is None:
        return
    ratios = stable.ratios[(stable.ratios > 0.0) & np.isfinite(stable.ratios)]
    if len(ratios) < LEAST:
        return
    scatter = scatter_of(np.log(ratios))
    yield (
        f"a single value lies off their level by a factor of {_two_digits(math.exp(scatter))} (one "
        "standard deviation): read the median; in batches of four times the tokens it would be "
        f"about {_two_digits(math.exp(scatter / 2.0))}"
    )


def _of_trust(run: Run) -> Iterator[str]:
    """What makes the verdict weak."""
    number = len(run.records)
    for status, remedy in NO_ANSWER.items():
        if (count := run.statuses.get(status, 0)) >= MANY * number:
            yield f"{count} of {number} measurements are {status}: trust this the less; {remedy}"
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
