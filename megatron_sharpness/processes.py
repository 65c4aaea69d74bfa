"""A training command as processes of this machine, and the end of all that it has started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_sharpness.core.errors import InputError

#: Seconds that processes have to end in, once they are asked to: torchrun waits 30 for its own.
PATIENCE = 40.0

#: Lines of a failed command's log that its error shows.
_TAIL = 15


def run_command(
    command: Sequence[str],
    log: Path,
    progress: Callable[[], str],
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a command to its end; what it prints goes to a file.

    Where it is left by an exception, Ctrl-C say, everything that it has started is ended, too.

    Args:
        command: program and arguments.
        log: the file.
        progress: what a terminal shows meanwhile; an exception of it ends the command.
        environment: variables in addition to those of this process.

    Returns:
        The exit status.

    Raises:
        InputError: there is no such program.
    """
    in_terminal = sys.stderr.isatty()
    with log.open("w") as file, _terminated() as begun:
        try:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
        except OSError as error:
            raise InputError(
                f"-- {command[0]}: it cannot be started ({error.strerror}); give a program on "
                "the PATH, torchrun say, or the path of one"
            ) from error
        begun.append(process)
        while process.poll() is None:
            time.sleep(0.1)
            shown = progress()
            if in_terminal:
                print(f"\r{shown} ", end="", file=sys.stderr)
        if in_terminal:
            print("\r", end="", file=sys.stderr)
    return process.returncode


def end_of(log: Path) -> str:
    """What the error of a command that failed shows of what it has printed."""
    text = log.read_text(errors="replace")
    # torchrun ends a log with a report of its own, in which the error does not stand.
    said = re.split(r"^.*\] failed \(exitcode: ", text, maxsplit=1, flags=re.MULTILINE)[0]
    return f"The end of {log}:\n" + "\n".join(said.splitlines()[-_TAIL:])


@contextlib.contextmanager
def _terminated() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Of the processes in the list, the groups that they lead are ended on leaving, SIGTERM
    and the end of the terminal being reasons to leave."""

    def leave(*args: object) -> None:
        raise KeyboardInterrupt

    begun: list[subprocess.Popen[bytes]] = []
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield begun
    finally:
        for process in begun:
            _end(process)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a group of processes to end, and after a while have it ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _is_there(process):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        until = time.monotonic() + PATIENCE
        with contextlib.suppress(KeyboardInterrupt):  # once more: no more patience
            while _is_there(process) and time.monotonic() < until:
                time.sleep(0.05)


def _is_there(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process or another one of its group still runs."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
