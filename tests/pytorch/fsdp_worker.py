"""One rank that makes the runs of a file, one after the other; each has a process group of its
own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from tests.processes import ROOT

sys.path.insert(0, str(ROOT / "launch"))

import train_fsdp


def copy_as_if_crashed(source: Path, target: Path) -> None:
    """Two checkpoints, as if a crash had struck while the second was saved."""
    partial = target.with_name("partial")
    shutil.copytree(source, partial)
    (partial / "latest_checkpointed_iteration.txt").write_text("3")
    for path in (partial / "iter_0000006").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    partial.rename(target)


def main(cases: Path) -> None:
    """The cases are folder, port, checkpoints to go on from, and command line."""
    rank = os.environ["RANK"]
    for own, port, source, argv in json.loads(cases.read_text()):
        folder = Path(own)
        if source and rank == "0":
            copy_as_if_crashed(Path(source), folder / "checkpoints")
        while source and not (folder / "checkpoints").exists():
            time.sleep(0.01)
        os.environ["MASTER_PORT"] = port
        with (
            (folder / f"output{rank}.txt").open("w") as output,
            contextlib.redirect_stdout(output),
        ):
            train_fsdp.main(argv)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
