"""``megatron-sharpness mix``: relative critical sharpness against the share of one kind of data.

For each share r the given training command is run once with the weights of r, frozen: Adam's
moments are accumulated over some batches of the mixture without updating the parameters, and then,
batch by batch, λ_c^{1→2} = 2/η_c^{1→2} of every evaluation set is measured (Def. 4.1, Section 5 of
arXiv 2601.16979). The command is Megatron's or ``launch/fsdp/train.py``'s, with whatever launcher,
model, checkpoint and parallel layout; what differs from a training run are flags that are added.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_sharpness.adaptive_mix.mixture import weights_at
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.measurement import TRAIN, relative_sharpness
from megatron_sharpness.sweeps import runs
from megatron_sharpness.sweeps.mix.recommendation import ENOUGH, Recommendation, recommend
from megatron_sharpness.sweeps.runs import Frozen, RunFailed
from megatron_sharpness.sweeps.settings import keep_settings
from megatron_sharpness.sweeps.spread import Spread, format_endings

SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

#: By share, λ_c of each task, a number for each batch.
Values = dict[float, dict[str, list[float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``megatron-sharpness mix``."""
    runs.add_arguments(parser, eval_data=True)
    parser.add_argument(
        "--vary", required=True, metavar="PREFIX", help="the data whose share varies"
    )
    parser.add_argument(
        "--fixed",
        nargs="+",
        required=True,
        metavar="WEIGHT PREFIX",
        help="the rest of the mixture, with weights that keep their proportions",
    )
    parser.add_argument(
        "--shares",
        nargs="+",
        type=float,
        default=list(SHARES),
        metavar="R",
        help="shares of the data that varies, between 0 and 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulate",
        type=int,
        default=100,
        metavar="N",
        help="batches that the moments are accumulated over (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure the shares that are still missing, and write records, table, figure and advice.

    Raises:
        InputError: a flag cannot be used, or the training command fails.
    """
    fixed = _check(arguments)
    out: Path = arguments.out
    kept = ("vary", "fixed", "eval_data", "eval_samples", "accumulate", "measure", "training")
    keep_settings(out, {name: getattr(arguments, name) for name in kept})
    frozen = Frozen.of(arguments, arguments.accumulate)
    shares = sorted(set(arguments.shares))
    missing = [share for share in shares if not _records(out, share).exists()]
    if len(missing) < len(shares):
        print(f"{len(shares) - len(missing)} of {len(shares)} shares are in {out} already")
    try:
        _measure(frozen, out, {r: mixture(arguments.vary, r, fixed) for r in missing})
    except KeyboardInterrupt:
        done = sum(_records(out, share).exists() for share in shares)
        raise KeyboardInterrupt(f"{done} of {len(shares)} shares are done") from None

    values, endings = read(out, shares)
    advice = recommend(values)
    write_table(out / "mix.csv", values, endings)
    (out / "recommendation.json").write_text(json.dumps(asdict(advice), indent=2) + "\n")
    from megatron_sharpness.sweeps.mix.figure import draw

    draw(values, advice, out / "mix.png", Path(arguments.vary).name)
    print(format_table(values))
    print(format_advice(advice, Path(arguments.vary).name))
    print(*(out / name for name in ("mix.csv", "mix.png", "recommendation.json")), sep="\n")


def _measure(frozen: Frozen, out: Path, mixtures: dict[float, list[str]]) -> None:
    """Run the training command for each share, with its ``--data-path``."""
    began = time.monotonic()
    for number, (share, data) in enumerate(mixtures.items(), start=1):
        flags = ["--data-path", *data, "--finetune"]
        flags += ["--exit-on-missing-checkpoint"]  # Megatron would begin with random weights
        try:
            frozen.run(flags, _records(out, share), f"share {share:g}, {number} of {len(mixtures)}")
        except RunFailed as error:
            raise InputError(
                f"share {share:g}: {error}Mend it and start this again: shares that are done are "
                "not done again"
            ) from None
        took = time.monotonic() - began
        left = took / number * (len(mixtures) - number)
        print(f"share {share:g}: done; {took:.0f} s so far, about {left:.0f} s left", flush=True)


def read(out: Path, shares: Sequence[float]) -> tuple[Values, dict[float, Counter[str]]]:
    """λ_c of every task by share, and how the measurements ended.

    A batch counts where all of its tasks have a value: a number, or ∞ and 0 as
    :func:`~megatron_sharpness.core.measurement.relative_sharpness` has them.

    Raises:
        InputError: nothing was measured at a share.
    """
    values: Values = {}
    endings: dict[float, Counter[str]] = {}
    for share in shares:
        batches: dict[int, dict[str, float | None]] = {}
        endings[share] = Counter()
        for line in _records(out, share).read_text().splitlines():
            record = json.loads(line)
            if record["batch"] == TRAIN:
                continue
            endings[share][record["status"]] += 1
            batches.setdefault(record["iteration"], {})[record["batch"]] = relative_sharpness(
                record["status"], record["critical_sharpness"], record.get("critical_lr_lower")
            )
        whole = [batch for batch in batches.values() if None not in batch.values()]
        if not whole:
            raise InputError(
                f"share {share:g}: no batch has a value for every task, but "
                f"{format_endings(endings[share])}; {_records(out, share)} says why"
            )
        values[share] = {task: [float(batch[task] or 0.0) for batch in whole] for task in whole[0]}
    return values, endings


def write_table(path: Path, values: Values, endings: dict[float, Counter[str]]) -> None:
    """A line for each share and task: mean, median and spread of λ_c over batches."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["share", "task", "batches", "mean", "median", "std", "q16", "q84", "critical_lr",
             "rises_at_once", "endings"]
        )  # fmt: skip
        for share, tasks in values.items():
            shown = format_endings(endings[share])
            for task, numbers in tasks.items():
                spread = Spread(tuple(numbers))
                median = spread.median
                table.writerow(
                    [share, task, len(numbers), spread.mean, median, spread.std,
                     spread.quantile(0.16), spread.quantile(0.84),
                     2 / median if median else math.inf, spread.rises_at_once, shown]
                )  # fmt: skip


def format_table(values: Values) -> str:
    """Medians of λ_c, a line a share and a column a task."""
    tasks = list(next(iter(values.values())))
    lines = ["share  " + "".join(f"{task:>14}" for task in tasks)]
    for share, numbers in values.items():
        medians = (Spread(tuple(numbers[task])).median for task in tasks)
        lines.append(f"{share:<7g}" + "".join(f"{median:>14.4g}" for median in medians))
    return "\n".join(lines)


def format_advice(advice: Recommendation, name: str) -> str:
    """The recommendation in words."""
    if not advice.lr:
        return (
            "no recommendation: at every share the loss of some task rises at once, whatever the "
            "learning rate; the model may not know all of this data, or be at a minimum of one"
        )
    is_sure = advice.batches >= ENOUGH
    if is_sure:
        basis = f"(chosen in {advice.votes[advice.share]:.0%} of the bootstrap's draws)"
    else:
        basis = (
            f"(from {advice.batches} batches, too few to say how sure that is: {ENOUGH} are "
            "needed, by a larger --measure and another --out)"
        )

    def interval(ends: tuple[float, float] | None, form: str) -> str:
        return f" (90 %: {ends[0]:{form}} to {ends[1]:{form}})" if ends and is_sure else ""

    lines = [
        f"recommended: {advice.share:.0%} {name} {basis}",
        f"  one step there raises no loss up to η = {advice.lr:.3g}"
        f"{interval(advice.lr_interval, '.3g')}; {advice.limits} rises first",
    ]
    if advice.crossing is None:
        lines.append(
            f"  no crossing: {advice.limits} limits at every neighbouring share, so that the mix "
            "is no trade-off between these tasks here"
        )
    else:
        lines.append(
            f"  the tasks that limit cross at {advice.crossing:.0%}"
            f"{interval(advice.crossing_interval, '.0%')}"
        )
    lines.append(
        "  η is for one step along the update, with Adam's moments frozen at this point, and not "
        "that of a training: over many steps losses may rise well below it"
    )
    return "\n".join(lines)


def mixture(vary: str, share: float, fixed: Sequence[tuple[float, str]]) -> list[str]:
    """``--data-path`` of a share: WEIGHT PREFIX …, without what has none."""
    weights = weights_at(share, [weight for weight, _ in fixed])
    prefixes = [vary, *(prefix for _, prefix in fixed)]
    parts = [(w, prefix) for w, prefix in zip(weights, prefixes, strict=True) if w > 0]
    if len(parts) == 1:
        return [parts[0][1]]
    return [text for weight, prefix in parts for text in (f"{weight:.10g}", prefix)]


def _records(out: Path, share: float) -> Path:
    return out / f"share-{share:g}.jsonl"


def _check(arguments: argparse.Namespace) -> list[tuple[float, str]]:
    """Refuse what can be refused before anything runs; the fixed components."""
    for share in arguments.shares:
        if not 0.0 <= share <= 1.0:
            raise InputError(f"--shares {share:g}: a share of the data lies between 0 and 1")
    if arguments.accumulate < 0:
        raise InputError(f"--accumulate {arguments.accumulate}: a number of steps; give 0 or more")
    given = arguments.fixed
    try:
        fixed = [(float(w), p) for w, p in zip(given[::2], given[1::2], strict=True)]
    except ValueError:
        raise InputError(
            f"--fixed {' '.join(given)}: it alternates; give WEIGHT PREFIX WEIGHT PREFIX …"
        ) from None
    if not all(0 < weight < math.inf for weight, _ in fixed):
        raise InputError(f"--fixed {' '.join(given)}: weights are positive numbers")
    for flag, prefix in (("--vary", arguments.vary), *(("--fixed", p) for _, p in fixed)):
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                raise InputError(
                    f"{flag} {prefix}: there is no {prefix}{suffix}; give the path of both "
                    "without the suffix (megatron-sharpness tokenize writes them)"
                )
    runs.check(arguments, ["--data-path"])
    return fixed
