"""Whether the numbers of a trial are right: each measurement evaluated again."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from megatron_sharpness.core.checks import EXACT
from megatron_sharpness.core.recorder import FAR
from megatron_sharpness.verify.traces import Trace

#: How far two losses that should be one may lie apart, in root-mean-square errors of a loss.
NOISE = 4.0

#: How far L(θ) may lie from a loss in the log, relatively: that is printed to seven digits.
LOGGED = 2 * EXACT
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")

#: The paper's search ends with a bracket of this relative width, and takes its middle.
BISECTION = 1 / 16


@dataclass
class Numbers:
    """What was confirmed of the measurements.

    Attributes:
        rows: of each what was measured, and evaluated again.
        wrong: what is not right: iteration and why.
        statuses: how each has ended.
        found: how many have an η_c.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[tuple[int, str]] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    found: int = 0

    @property
    def right(self) -> bool:
        return not self.wrong


def check(measured: Trace) -> Numbers:
    """The measurements of a run, as all its ranks have confirmed them."""
    numbers, log = Numbers(), measured.log
    for number in sorted(log)[:2]:  # Megatron's second line is the mean of both
        del log[number]
    ranks = [measured.rank(rank).confirmed for rank in range(measured.ranks)]
    lines = ranks[0]
    for record in measured.records:
        numbers.statuses.append(record["status"])
        if record["status"] == "failed":
            numbers.wrong.append((record["iteration"], f"not measured: {record['reason']}"))
    # Else Megatron's log averages over tokens, and its gradient over micro-batches.
    even = len({n for confirmed in ranks for line in confirmed for n in line["tokens"]}) <= 1
    for line in lines:
        numbers.rows.append(line)
        numbers.found += bool(line["losses"])
        numbers.wrong += [(line["confirmed"], reason) for reason in _wrong(line)]
        if even and (reason := _not_logged(line, log.get(line["confirmed"], {}))) is not None:
            numbers.wrong.append((line["confirmed"], reason))
    said = ("measured", "trained", "replayed", "losses", "bisection")
    for rank, confirmed in enumerate(ranks):
        for mine, other in zip(confirmed, lines, strict=False):
            for name in said:
                if _timeless(mine[name]) != _timeless(other[name]):
                    numbers.wrong.append(
                        (mine["confirmed"], f"rank {rank} has other numbers than rank 0 ({name})")
                    )
    return numbers


def _timeless(value: Any) -> Any:
    return {**value, "seconds": 0.0} if isinstance(value, dict) else value


def _wrong(line: dict[str, Any]) -> list[str]:
    """What is not right with a measurement."""
    record, trained, replayed = line["measured"], line["trained"], line["replayed"]
    if line["error"] is not None:
        return [f"it could not be evaluated again: {line['error']}"]
    noise = NOISE * (record["noise"] or 0.0)
    found = []
    if trained is not None:
        most = max(EXACT * max(1.0, abs(trained)), noise)
        if not abs(replayed - trained) <= most:
            found.append(
                f"L(θ) was {trained:.9g} in training and {replayed:.9g} when it was replayed, "
                f"{abs(replayed - trained):.2g} apart"
            )
    if line["apart"] and line["apart"][0] == line["apart"][1]:
        found.append(
            f"the probes do not move the weights: L is {line['apart'][0]:.9g} at the step's own "
            f"learning rate and at {FAR:g} times that"
        )
    if not line["losses"]:
        return found
    below, at, above = line["losses"]
    loss = record["loss"]
    if not below <= loss < above:
        found.append(
            f"the bracket is not one: L is {below:.9g} at its lower end, {loss:.9g} at θ and "
            f"{above:.9g} at its upper end"
        )
    elif not abs(at - loss) <= max(abs(below - loss), abs(above - loss)) + noise:
        found.append(f"L at η_c, {at:.9g}, is farther from L(θ), {loss:.9g}, than at the ends")
    other = line["bisection"]
    if other["critical_lr"] is None:
        found.append(f"the paper's search has not found η_c: {other['status']}")
    elif not line_crosses_once(line):
        return found
    elif not agrees(record, other["critical_lr"]):
        found.append(
            f"η_c is {record['critical_lr']:.6g}, and {other['critical_lr']:.6g} by the paper's "
            "search"
        )
    return found


def _not_logged(line: dict[str, Any], logged: dict[str, str]) -> str | None:
    """Whether L(θ) is no loss that the training's own log has, nor all of them together."""
    losses = {
        name: float(value)
        for name, value in logged.items()
        if name.endswith("loss") and _NUMBER.fullmatch(value)
    }
    trained = line["trained"]
    if not losses or trained is None:
        return None
    most = LOGGED * max(1.0, abs(trained))
    if any(abs(loss - trained) <= most for loss in (*losses.values(), sum(losses.values()))):
        return None
    said = ", ".join(f"{name} {value:.7g}" for name, value in losses.items())
    return f"L(θ) is {trained:.9g}, and the training's own log says {said}"


def line_crosses_once(line: dict[str, Any]) -> bool:
    """Whether the loss was not seen to cross L(θ) more than once: two searches may find two η_c."""
    return not (line["measured"]["non_monotone"] or line["bisection"]["non_monotone"])


def agrees(record: dict[str, Any], other: float) -> bool:
    """Whether two η_c are one, to half of the bisection's bracket and four standard errors."""
    error = BISECTION / 2 + 4.0 * (record["critical_lr_error"] or 0.0)
    return bool(abs(record["critical_lr"] / other - 1) <= error)
