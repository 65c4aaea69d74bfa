"""A real SLURM on this machine, of one node, for as long as a test needs it.

Its configuration, key, sockets, spool folders, logs and process ids lie in a folder of its own, and
its ports are free ones: another SLURM on the machine, and what is in /etc, are left alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.processes import ROOT

#: Of Debian's packages munge and slurm-wlm.
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")

#: Where to look for them: the daemons lie where not every PATH leads.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])

#: Jobs of the partition ``urgent`` preempt those of ``normal``, which then have this many seconds.
GRACE = 120

#: A job that was requeued waits for as long as the credentials of its steps could still be used.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munged.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
FirstJobId={first_job}
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 State=UNKNOWN
PartitionName=normal Nodes={host} Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes={host} PriorityTier=2
"""


class Unavailable(Exception):
    """Why there is no SLURM here."""


class Slurm:
    """The cluster; its jobs are known by their ids.

    Args:
        folder: with ``slurm.conf`` and all that the daemons write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        others = ("SLURM_", "SBATCH_", "SRUN_")  # of a job that the tests may be one of
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        self.environment = {**inherited, "SLURM_CONF": str(self.configuration), "PATH": PATH}

    def call(
        self, *command: str, timeout: float = 60, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """One of its programs, in the checkout, with further environment variables."""
        return subprocess.run(
            command, env=self.environment | variables, cwd=ROOT,
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def ask(self, *command: str, **variables: str) -> str:
        """The output of one of its programs, which has to succeed."""
        done = self.call(*command, **variables)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What it says of a job: JobState, Restarts, …"""
        fields = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)


def wait(until: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not (true := until()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return true


@contextlib.contextmanager
def running_slurm() -> Iterator[Slurm]:
    """A SLURM whose node runs jobs; in the end they are cancelled.

    Raises:
        Unavailable: it is not installed, or does not start here.
    """
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        raise Unavailable(f"not installed: {', '.join(missing)}; install munge and slurm-wlm")
    if os.geteuid() != 0:
        raise Unavailable("slurmd has to be started by root")
    # Not in pytest's folder: the path of a socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    slurm = Slurm(folder)
    try:
        begin(slurm)
        yield slurm
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if (folder / "slurmctld.pid").exists():
                slurm.call("scancel", "--full", "--user=root")
                wait(lambda: not slurm.call("squeue", "--noheader").stdout, 60)
        for name in ("slurmd", "slurmctld", "munged"):
            end(folder / f"{name}.pid")
        shutil.rmtree(folder, ignore_errors=True)


def begin(slurm: Slurm) -> None:
    """Start the daemons, and have the node run something."""
    configure(slurm)
    try:
        for command in (munged(slurm.folder), ["slurmctld", "-c"], ["slurmd"]):
            start(slurm, command)
        if not wait(lambda: slurm.call("srun", "--immediate=10", "true").returncode == 0, 30):
            raise Unavailable(f"its node runs nothing: {logs(slurm.folder)}")
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{error}: {logs(slurm.folder)}") from error


def configure(slurm: Slurm) -> None:
    """Write ``slurm.conf``, for ports that are free."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        controller_port, node_port = (each.getsockname()[1] for each in sockets)
    host = socket.gethostname().partition(".")[0]
    slurm.configuration.write_text(
        CONFIGURATION.format(
            folder=slurm.folder, host=host, controller_port=controller_port, node_port=node_port,
            first_job=1 + os.getpid() % 9000, grace=GRACE,  # launchers make a port of a job's id
        )
    )  # fmt: skip


def munged(folder: Path) -> list[str]:
    """The command of the daemon that signs messages, with a key of its own."""
    key = folder / "munged.key"
    key.touch(0o400)
    key.write_bytes(secrets.token_bytes(1024))
    files = [f"--{name}-file={folder}/munged.{name}" for name in ("key", "pid", "log", "seed")]
    # By force: its socket is for root alone, in a folder of mode 700.
    return ["munged", "--force", f"--socket={folder}/munged.socket", *files]


def start(slurm: Slurm, command: list[str]) -> None:
    """Start a daemon and wait until it is one."""
    with (slurm.folder / f"{command[0]}.out").open("w") as output:
        done = subprocess.run(
            command, env=slurm.environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, timeout=60,
        )  # fmt: skip
    started = done.returncode == 0
    if not started or not wait((slurm.folder / f"{command[0]}.pid").exists, 10):
        raise Unavailable(f"{command[0]} does not start: {logs(slurm.folder)}")


def logs(folder: Path) -> str:
    """The ends of what the daemons wrote."""
    files = sorted([*folder.glob("*.out"), *folder.glob("*.log")])
    ends = {file.name: " ".join(file.read_text().split())[-250:] for file in files}
    return "; ".join(f"{name}: {end}" for name, end in ends.items() if end)


def end(pid_file: Path) -> None:
    """End a daemon and wait until it is gone."""
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())

    def gone() -> bool:
        return not Path(f"/proc/{pid}").exists()

    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        if not wait(gone, 15):
            os.kill(pid, signal.SIGKILL)
            wait(gone, 5)
