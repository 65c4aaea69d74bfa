"""What a verification has found: in a few lines, as a page, and as JSON."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sharpness.verify.cost import INTERVALS
from megatron_sharpness.verify.differences import FACTOR, Comparison, Difference, grouped
from megatron_sharpness.verify.number import Numbers, line_crosses_once

#: Exit status: all promises hold, one does not, or it could not be told.
HOLDS, DIFFERS, NOT_TOLD = 0, 1, 2

#: What makes what a training begins with repeat.
SEED = "Give what initializes that a fixed seed"

#: What makes kernels repeat.
REMEDY = (
    "Megatron's --deterministic-mode (with NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, "
    "CUBLAS_WORKSPACE_CONFIG=:4096:8 and NCCL_ALGO=Ring), or "
    "torch.use_deterministic_algorithms(True), makes kernels repeat"
)


@dataclass(frozen=True)
class Verification:
    """A training that was run without measurement, twice, and with it.

    Attributes:
        command: that trains; empty where it was called.
        every: the interval of the measurements.
        facts: what rank 0 ran on.
        comparison: of the three.
        numbers: the measurements, evaluated again.
        cost: in time and memory.
    """

    command: Sequence[str]
    every: int
    facts: dict[str, Any]
    comparison: Comparison
    numbers: Numbers
    cost: dict[str, Any]

    @property
    def status(self) -> int:
        """0, 1 or 2: as the exit status."""
        if not self.comparison.same or not self.numbers.right:
            return DIFFERS
        return HOLDS if self.numbers.found and not self._begins_elsewhere else NOT_TOLD

    @property
    def _begins_elsewhere(self) -> bool:
        """Whether the runs begin with other weights: what chance does then hides everything."""
        found = self.comparison
        return found.by_itself is not None and found.by_itself.iteration == found.start

    @property
    def promises(self) -> dict[str, str]:
        """Each, and whether it holds."""
        return {
            "training repeats by itself": self._repeats(),
            "training with measurement is the same": self._same(),
            "the number is right": self._right(),
            "what it costs": self._costs(),
        }

    def __str__(self) -> str:
        return "\n".join(f"{promise}: {said}" for promise, said in self.promises.items())

    def document(self) -> dict[str, Any]:
        """All of it, for JSON."""
        comparison = asdict(self.comparison)
        comparison["unsteady"] = sorted(self.comparison.unsteady)
        document = {
            "status": self.status, "promises": self.promises, "command": list(self.command),
            "every": self.every, "facts": self.facts, "comparison": comparison,
            "measurements": self.numbers.rows, "wrong": self.numbers.wrong, "cost": self.cost,
        }  # fmt: skip
        return _strict(document)  # type: ignore[no-any-return]

    def page(self) -> str:
        """As Markdown."""
        facts = self.facts
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        layout = ", ".join(f"{name} {value}" for name, value in facts["layout"].items())
        exactly = "all promises hold" if self.comparison.repeats else "as far as it can be told"
        verdict = {HOLDS: exactly, DIFFERS: "a promise does not hold",
                   NOT_TOLD: "it could not be told"}[self.status]  # fmt: skip
        parts = [
            f"# Critical sharpness verified: {verdict}",
            _table(("promise", "in this training"), self.promises.items()),
            "## The training",
            f"```\n{shlex.join(self.command)}\n```" if self.command else "",
            _table(
                ("", ""),
                (
                    ("processes", facts["ranks"]),
                    ("device of rank 0", f"{facts['device']} ({facts['processor']})"),
                    ("versions", versions),
                    ("layout", layout),
                ),
            ),
            "## Measurements",
            _table(
                ("iteration", "status", "λ_c", "L(θ) in training", "replayed", "L at the lower end",
                 "at η_c", "at the upper end", "η_c", "by the paper's search", "forward passes",
                 "of the paper's"),
                map(_row, self.numbers.rows),
            ),
            "## Time and memory",
            _table(("", ""), self._cost_rows()),
            self._details(),
        ]  # fmt: skip
        return "\n\n".join(part for part in parts if part) + "\n"

    def _repeats(self) -> str:
        found = self.comparison
        if found.by_itself is None:
            lines = f", and {found.log_lines} lines of the log" if found.log_lines else ""
            ranks = self.facts["ranks"]
            return (
                f"yes: {found.values:,} values of {ranks} process{'es' if ranks > 1 else ''} after "
                f"each of {found.iterations} iterations{lines}"
            )
        return (
            f"no: two runs without measurement part {self._where(found.by_itself)}. "
            f"{SEED if self._begins_elsewhere else REMEDY}"
        )

    def _same(self) -> str:
        found = self.comparison
        if found.disturbed is not None:
            return f"NO: it differs {self._where(found.disturbed)}"
        if found.beyond:
            i = found.beyond[0]
            return (
                f"NO: after iteration {i} its tensors lie {found.ratio[i]:.2g} times as far from "
                "those of the runs without as these are apart, in the median"
            )
        if found.log_differs is not None:
            i, names = found.log_differs
            return f"NO: the log of iteration {i} says another {grouped(names)}"
        if found.repeats:
            return "yes, bit for bit"
        if self._begins_elsewhere:
            return "not told: runs that begin elsewhere are no nearer to each other than to it"
        most = max(found.ratio.values(), default=0.0)
        return (
            "as far as that can be told: up to where training itself parts bit for bit, and then "
            f"never more than {FACTOR:g} times as far from the runs without as these are apart "
            f"(at most {most:.2g} times, in the median of tensors)"
        )

    def _right(self) -> str:
        numbers = self.numbers
        if numbers.wrong:
            i, reason = numbers.wrong[0]
            more = f" (and {len(numbers.wrong) - 1} more)" if len(numbers.wrong) > 1 else ""
            return f"NO: iteration {i}: {reason}{more}"
        if not numbers.found:
            statuses = ", ".join(sorted(set(numbers.statuses)))
            overflow = ", a smaller --initial-loss-scale" if "skipped_step" in statuses else ""
            return (
                f"not told: no measurement has found an η_c ({statuses or 'none was made'}); give "
                f"more --iterations, a smaller --every{overflow}, or a training that is farther on "
                "(--load)"
            )
        errors = [abs(r["replayed"] - r["trained"]) for r in numbers.rows if r["trained"]]
        replayed = f"L(θ) is replayed to {max(errors):.2g} nat, " if errors else ""
        return (
            f"yes: of {len(numbers.rows)} measurements {numbers.found} have an η_c; {replayed}each "
            "bracket holds when it is evaluated again, and the paper's search finds the same"
        )

    def _costs(self) -> str:
        cost = self.cost
        if not cost["iteration_seconds"] or not cost["measurement_seconds"]:
            return "not told: too few iterations"
        return (
            f"a measurement takes {cost['measurement_seconds'] / cost['iteration_seconds']:.2f} "
            f"iterations; every 100 that is {cost['overhead']['100']:.2%} of the training time"
        )

    def _where(self, difference: Difference) -> str:
        return f"{self._when(difference)}, in {grouped(difference.names)}"

    def _when(self, difference: Difference) -> str:
        when = f"after iteration {difference.iteration}"
        if difference.iteration == self.comparison.start:
            when = "before the first iteration"
        return f"{when} on rank {difference.rank}"

    def _cost_rows(self) -> list[tuple[str, str]]:
        cost = self.cost
        iteration, one = cost["iteration_seconds"], cost["pass_seconds"]
        rows = [
            ("an iteration without measurement", _seconds(iteration)),
            ("a forward-only pass over its batch", _seconds(one)),
            ("a probe", _seconds(cost["probe_seconds"], one, "passes")),
            ("the first measurement, which tests itself",
             _seconds(cost["first_measurement_seconds"], iteration, "iterations")),
            ("a later measurement", _seconds(cost["measurement_seconds"], iteration, "iterations")),
        ]  # fmt: skip
        for every in INTERVALS:
            share = cost["overhead"][str(every)]
            rows.append((f"overhead at every {every}", "–" if share is None else f"{share:.2%}"))
        for kind in ("device", "host"):
            if (memory := cost[f"{kind}_memory"]) is not None:
                off, on = (memory[key] / 2**20 for key in ("off", "on"))
                rows.append(
                    (f"peak memory of the {kind}, off and on, of rank {memory['rank']}",
                     f"{off:,.1f} and {on:,.1f} MiB, {on - off:+,.1f}")
                )  # fmt: skip
        return rows

    def _details(self) -> str:
        lines = [f"- iteration {i}: {reason}" for i, reason in self.numbers.wrong]
        lines += [
            f"- iteration {row['confirmed']}: the loss crosses L(θ) more than once, so that two "
            "searches may find two η_c"
            for row in self.numbers.rows
            if row["losses"] and not line_crosses_once(row)
        ]
        if unsteady := self.comparison.unsteady:
            lines.append(f"- not compared, since no two runs have the same: {grouped(unsteady)}")
        if log := self.comparison.log_unsteady:
            lines.append(f"- nor, in the lines of the log: {grouped(log)}")
        for title, found in (("without measurement", self.comparison.by_itself),
                             ("with measurement", self.comparison.disturbed)):  # fmt: skip
            if found is not None:
                lines.append(f"- {title}, {self._when(found)}: {grouped(found.names, 200)}")
        return "\n".join(["## Details", "", *lines]) if lines else ""


def _row(line: dict[str, Any]) -> Sequence[str]:
    record, other = line["measured"], line["bisection"] or {}
    losses = line["losses"] or [None] * 3
    return [
        str(line["confirmed"]), record["status"], _number(record["critical_sharpness"], 5),
        *(_number(value, 9) for value in (line["trained"], line["replayed"], *losses)),
        _number(record["critical_lr"], 5), _number(other.get("critical_lr"), 5),
        str(record["evaluations"]), str(other.get("evaluations", "–")),
    ]  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _seconds(value: float | None, unit: float | None = None, name: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:.4g} s" + (f", {value / unit:.2f} {name}" if unit else "")


def _strict(value: Any) -> Any:
    """The same with ``None`` for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _strict(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
