"""``megatron-sharpness``: the commands beside training itself.

Every command is a module with ``add_arguments(parser)`` and ``run(arguments)``. These modules
import what is heavy (torch, Megatron, matplotlib) only when they run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.data import tokenize
from megatron_sharpness.estimate import command as estimate
from megatron_sharpness.report import command as report
from megatron_sharpness.sweeps.checkpoints import command as checkpoints
from megatron_sharpness.sweeps.mix import command as mix
from megatron_sharpness.verify import command as verify

COMMANDS = {
    "tokenize": (tokenize, "write text into Megatron's indexed dataset format, byte by byte"),
    "report": (report, "print the last measurements of a run and draw its curves"),
    "mix": (mix, "measure which loss breaks first for each share of a data mix, and recommend one"),
    "checkpoints": (
        checkpoints,
        "measure a series of checkpoints, without their optimizer if need be",
    ),
    "verify": (verify, "prove with a training command that it is measured right, and unchanged"),
    "estimate": (estimate, "predict what measuring would cost a run, in time and memory"),
}

#: Exit status after Ctrl-C, as shells have it.
STOPPED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for input that cannot be used, 130 after
    Ctrl-C, or one that the command itself explains."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="megatron-sharpness", description="The commands beside training itself."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary, description=summary + "."))
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command][0].run(arguments) or 0
    except InputError as error:
        print(f"megatron-sharpness {arguments.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        again = shlex.join(["megatron-sharpness", *argv])
        said = f"stopped; {stop}. To go on: {again}" if stop.args else "stopped"
        print(f"megatron-sharpness {arguments.command}: {said}", file=sys.stderr)
        return STOPPED


def version() -> str:
    """The version that is installed; a source tree that is not installed has none."""
    try:
        return installed_version("megatron-sharpness")
    except PackageNotFoundError:
        return "of a source tree that is not installed (pip install -e .)"


if __name__ == "__main__":
    sys.exit(main())
