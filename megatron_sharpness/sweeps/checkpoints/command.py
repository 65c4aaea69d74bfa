"""``megatron-sharpness checkpoints``: how λ_c evolved in a run that is over.

The given training command is run once for each checkpoint, frozen: it reads the checkpoint,
accumulates Adam's moments over some steps where they are not the checkpoint's own, and measures
each of the next steps. Parameters are never updated, which the run proves by their hash.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.sweeps import runs
from megatron_sharpness.sweeps.checkpoints.cost import Cost
from megatron_sharpness.sweeps.checkpoints.points import (
    Point,
    format_table,
    read_points,
    write_table,
)
from megatron_sharpness.sweeps.checkpoints.sources import Checkpoint, in_folder, of_hugging_face
from megatron_sharpness.sweeps.runs import Frozen, Report, RunFailed
from megatron_sharpness.sweeps.settings import keep_settings
from megatron_sharpness.sweeps.spread import format_endings

#: Exit status where checkpoints were skipped, or have no number.
SKIPPED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``megatron-sharpness checkpoints``."""
    runs.add_arguments(parser)
    parser.epilog = (
        f"{parser.epilog} The exit status is 0, {SKIPPED} where a checkpoint was skipped or has no "
        "number, and 1 where nothing could be done."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--load",
        type=Path,
        metavar="FOLDER",
        help="checkpoints of Megatron or of launch/fsdp/train.py: the --save of the run",
    )
    source.add_argument(
        "--hf-model",
        nargs="+",
        metavar="NAME_OR_FOLDER",
        help="checkpoints in the Hugging Face format: folders, or a model on the hub",
    )
    parser.add_argument(
        "--iterations", nargs="+", type=int, metavar="N", help="of --load (default: all)"
    )
    parser.add_argument(
        "--revisions",
        nargs="+",
        default=[],
        metavar="R",
        help="of --hf-model on the hub; 'stage1-step*' is all branches that match",
    )
    parser.add_argument(
        "--moments",
        metavar="checkpoint | warm:N",
        help="Adam's moments: those of the checkpoint, or accumulated over N steps (default: "
        "checkpoint for --load, warm:100 for --hf-model)",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="make a step or two on the first checkpoint, print what all will cost, and end",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure the checkpoints that are still missing, and write records, table and figure.

    Returns:
        The exit status.

    Raises:
        InputError: a flag cannot be used, or no checkpoint could be measured.
    """
    accumulate, checkpoints = _check(arguments)
    out: Path = arguments.out
    kept = ("moments", "measure", "eval_data", "eval_samples", "training")
    keep_settings(out, {name: getattr(arguments, name) for name in kept})
    own_moments = arguments.moments == "checkpoint"
    series = Series(out, Frozen.of(arguments, accumulate), own_moments=own_moments)
    missing = [c for c in checkpoints if not series.is_done(c)]
    print(f"checkpoints: {len(checkpoints)}, done: {len(checkpoints) - len(missing)}")
    try:
        skipped = series.estimate(missing)
        if arguments.estimate and len(skipped) < len(missing):
            return SKIPPED if skipped else 0
        skipped |= series.measure_all([c for c in missing if c.label not in skipped])
    except KeyboardInterrupt:
        done = sum(map(series.is_done, checkpoints))
        raise KeyboardInterrupt(f"{done} of {len(checkpoints)} checkpoints are done") from None

    points = [p for c in checkpoints if series.is_done(c) for p in series.read(c)]
    if not points:
        raise InputError(f"--out {out}: none of the checkpoints could be measured; see above")
    write_table(out / "checkpoints.csv", points)
    from megatron_sharpness.sweeps.checkpoints.figure import draw

    draw(points, out / "checkpoints.png")
    print(format_table(points))
    print(out / "checkpoints.csv", out / "checkpoints.png", sep="\n")
    without = [point for point in points if not point.spread.values]
    for point in without:
        print(_why(point))
    if skipped:
        print(f"{len(skipped)} of {len(checkpoints)} were skipped: {', '.join(skipped)}")
    return SKIPPED if skipped or without else 0


def _why(point: Point) -> str:
    """Why a point has no number, and what to do."""
    said = f"{point.checkpoint.label}: no λ_c of {point.batch}, but {format_endings(point.endings)}"
    if point.reason:
        said += f" ({point.reason})"
    if point.own and point.own["status"] == "zero_lr":
        said += ", at the checkpoint's own learning rate; give --moments warm:100 and another --out"
    return said


class Series:
    """Measured checkpoints in a folder: ``LABEL.jsonl`` holds the records, ``LABEL.json`` the rest.

    Args:
        out: the folder.
        frozen: what is done at each checkpoint.
        own_moments: Adam's moments are those of the checkpoint.
    """

    def __init__(self, out: Path, frozen: Frozen, *, own_moments: bool) -> None:
        self.out, self.frozen, self.own_moments = out, frozen, own_moments

    def is_done(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint has been measured.

        Raises:
            InputError: another one of this name has.
        """
        path = self._path(checkpoint, ".json")
        if not path.exists():
            return False
        flags = json.loads(path.read_text())["flags"]
        if flags != list(checkpoint.flags):
            raise InputError(
                f"--out {self.out}: it holds a {checkpoint.label} that was read by "
                f"{' '.join(flags)}; give another folder"
            )
        return True

    def measure(self, checkpoint: Checkpoint, shown: str) -> str:
        """Measure one, and say what came of it.

        Raises:
            RunFailed: it cannot be read, or the training command failed.
        """
        report = self._run(self.frozen, checkpoint, self._path(checkpoint, ".jsonl"), shown)
        held = {"flags": checkpoint.flags, **asdict(report)}
        self._path(checkpoint, ".json").write_text(json.dumps(held, indent=2) + "\n")
        own = self.read(checkpoint)[0]
        count = len(own.spread.finite or own.spread.values)
        said = f"λ_c = {own.text} over {count} batches" if count else f"no λ_c, but {own.text}"
        return f"{said}; nothing has changed, sha256 {report.sha256[:12]}…"

    def measure_all(self, checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
        """Measure these, and print what came of each.

        Returns:
            Why some could not be, by label.
        """
        began = time.monotonic()
        failed: dict[str, str] = {}
        for number, checkpoint in enumerate(checkpoints, start=1):
            label = checkpoint.label
            try:
                said = self.measure(checkpoint, f"{label}, {number} of {len(checkpoints)}")
            except RunFailed as error:
                failed[label] = str(error)
                said = f"skipped: {error}".rstrip()
            took = time.monotonic() - began
            left = took / number * (len(checkpoints) - number)
            print(f"{label}: {said}; {took:.0f} s so far, about {left:.0f} s left", flush=True)
        return failed

    def estimate(self, missing: Sequence[Checkpoint]) -> dict[str, str]:
        """Time the first steps on a checkpoint that can be read, and print what all will cost.

        Returns:
            Why those before it cannot be read, by label; all of them, maybe.
        """
        probe = replace(self.frozen, accumulate=min(1, self.frozen.accumulate), measure=1)
        unreadable: dict[str, str] = {}
        records = self.out / "estimate.jsonl"
        for checkpoint in missing:
            try:
                report = self._run(probe, checkpoint, records, f"timing {checkpoint.label}")
            except RunFailed as error:
                print(f"{checkpoint.label}: skipped: {error}".rstrip(), flush=True)
                unreadable[checkpoint.label] = str(error)
                continue
            lines = [json.loads(line) for line in records.read_text().splitlines()]
            records.unlink()  # nothing is measured yet that the folder's settings could belong to
            cost = Cost.of(report, lines, steps=probe.accumulate + 1)
            count = len(missing) - len(unreadable)
            print(cost.text(checkpoint.label, count, self.frozen), flush=True)
            break
        return unreadable

    def read(self, checkpoint: Checkpoint) -> list[Point]:
        """What was measured at a checkpoint, the step's own batch first."""
        report = json.loads(self._path(checkpoint, ".json").read_text())
        records = self._path(checkpoint, ".jsonl")
        return read_points(checkpoint, records, report["sha256"], own_moments=self.own_moments)

    def _run(self, frozen: Frozen, checkpoint: Checkpoint, records: Path, shown: str) -> Report:
        if checkpoint.problem is not None:
            raise RunFailed(checkpoint.problem)
        if not self.own_moments:
            return frozen.run([*checkpoint.flags, "--finetune"], records, shown)
        flags = [*checkpoint.flags, "--use-checkpoint-opt_param-scheduler"]
        return frozen.run(flags, records, shown, begin=checkpoint.iteration or 0)

    def _path(self, checkpoint: Checkpoint, suffix: str) -> Path:
        return self.out / f"{checkpoint.label}{suffix}"


def _check(arguments: argparse.Namespace) -> tuple[int, list[Checkpoint]]:
    """Refuse what can be refused before anything runs; steps for the moments, and checkpoints."""
    if arguments.moments is None:
        arguments.moments = "checkpoint" if arguments.load else "warm:100"
    moments = steps_of_moments(arguments.moments)
    if moments is None and arguments.hf_model:
        raise InputError(
            "--moments checkpoint: checkpoints in the Hugging Face format hold no optimizer; give "
            "warm:100"
        )
    runs.check(arguments, ["--load", "--hf-model", "--finetune"])
    if arguments.load:
        if arguments.revisions:
            raise InputError("--revisions: they are of --hf-model; give --iterations")
        checkpoints = in_folder(arguments.load, arguments.iterations)
    else:
        if arguments.iterations:
            raise InputError("--iterations: they are of --load; give --revisions")
        checkpoints = of_hugging_face(arguments.hf_model, arguments.revisions)
    return moments or 0, checkpoints


def steps_of_moments(given: str) -> int | None:
    """Steps of ``warm:N``; None for ``checkpoint``.

    Raises:
        InputError: it is neither.
    """
    if given == "checkpoint":
        return None
    word, _, steps = given.partition(":")
    if word != "warm" or not steps.isdecimal():
        raise InputError(
            f"--moments {given}: give 'checkpoint', or 'warm:100' with a number of steps"
        )
    return int(steps)
