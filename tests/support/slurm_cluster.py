"""A cluster of Slurm on one machine, whose two nodes are network namespaces, and what belongs to its jobs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.deployments import start, still_there
from tests.support.network_namespaces import TwoHosts, two_hosts

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
_NODES = ("node0", "node1")
# What Slurm takes for the two GPUs of each node.
_DEVICES = ("/dev/null", "/dev/zero")
_NETNS = Path("/etc/netns")
_DAEMON_S = 20.0
_COMMAND_S = 20.0
_CONF = """\
ClusterName=tprt
SlurmctldHost={host}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[0-1] CPUs=8 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES
"""


@dataclass(frozen=True)
class SlurmCluster:
    """The nodes node0 and node1, and where the cluster keeps its files."""

    hosts: TwoHosts
    folder: Path

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command on node0; return its standard output."""
        return subprocess.run(
            self.hosts.on(0, command),
            cwd=cwd,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=_COMMAND_S,
        ).stdout

    def submit(self, script: str, cwd: Path, **options: int) -> int:
        """Submit a batch script, whose output goes to `job.out` in `cwd`; return the number of the job."""
        path = cwd / "job.sh"
        path.write_text(script, encoding="utf-8")
        (cwd / "job.out").unlink(missing_ok=True)
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return int(self.run("sbatch", "--parsable", "--output=job.out", *given, str(path), cwd=cwd))

    def state_of(self, job: int) -> str:
        """Return the state of a job: RUNNING, COMPLETING, FAILED, ..."""
        found = re.search(r"JobState=(\w+)", self.run("scontrol", "--oneliner", "show", "job", str(job)))
        assert found is not None
        return found[1]

    def wait_for_end(self, job: int, timeout_s: float) -> str:
        """Return the state in which a job has ended."""
        deadline_s = time.monotonic() + timeout_s
        while (state := self.state_of(job)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline_s, state
            time.sleep(0.1)
        return state

    def processes_of_jobs(self, *variables: str) -> list[int]:
        """Return the processes of this cluster's jobs that have these variables in their environment."""
        found = self._environments()
        return [
            pid
            for pid, given in found.items()
            if given.issuperset(variables) and any(one.startswith("SLURM_JOB_ID=") for one in given)
        ]

    def end_jobs(self) -> None:
        """Kill what runs, and wait until Slurm's own processes of the jobs have seen it."""
        for pid in self.processes_of_jobs():
            _kill(pid)
        names = {pid: Path(f"/proc/{pid}/cmdline") for pid in self._environments()}
        for pid in still_there([pid for pid, name in names.items() if _begins(name, b"slurmstepd")]):
            _kill(pid)

    def _environments(self) -> dict[int, set[str]]:
        """Return the environments, by pid, of the processes that belong to this cluster."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                given = set(path.read_text(errors="replace").split("\0"))
                if f"SLURM_CONF={self.folder}/slurm.conf" in given:
                    found[int(path.parent.name)] = given
        return found


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Start a cluster that keeps its files in `folder`, or skip the test where this machine has no Slurm.

    While it is there, SLURM_CONF and PATH in this process's environment are such that jobs find it and tprt.
    """
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"Slurm is not installed: {', '.join(missing)} not found")
    with two_hosts() as hosts, pytest.MonkeyPatch.context() as patch, _names(hosts):
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        _write_settings(folder, hosts)
        cluster = SlurmCluster(hosts, folder)
        with contextlib.ExitStack() as stack:
            for number, command in enumerate(_daemons(folder, hosts)):
                stack.enter_context(_daemon(command, folder / f"daemon-{number}.log"))
            _wait_for_nodes(cluster)
            try:
                yield cluster
            finally:
                cluster.end_jobs()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _begins(file: Path, words: bytes) -> bool:
    with contextlib.suppress(OSError):
        return file.read_bytes().startswith(words)
    return False


def _daemons(folder: Path, hosts: TwoHosts) -> Iterator[list[str]]:
    paths = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
    paths |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    files = [f"--{name}={folder}/{file}" for name, file in paths.items()]
    yield ["munged", "--foreground", "--force", *files]
    yield hosts.on(0, ["slurmctld", "-D", "-c"])
    for node_rank, name in enumerate(_NODES):
        yield hosts.on(node_rank, ["slurmd", "-D", "-N", name])


@contextmanager
def _daemon(command: list[str], log: Path) -> Iterator[None]:
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, process_group=0) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(_DAEMON_S)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def _names(hosts: TwoHosts) -> Iterator[None]:
    """Let the hosts know each other's names: `ip netns exec` shows them as /etc/hosts."""
    known = "".join(f"{pair[0]} {pair[1]}\n" for pair in zip(hosts.addresses, _NODES, strict=True))
    folders = [_NETNS / name for name in hosts.names]
    try:
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            _NETNS.rmdir()


def _write_settings(folder: Path, hosts: TwoHosts) -> None:
    for name in ("state", *(f"spool-{node}" for node in _NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    settings = _CONF.format(host=socket.gethostname(), address=hosts.addresses[0], folder=folder)
    (folder / "slurm.conf").write_text(settings)
    # Named, so that no mounted cgroups are looked for.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    devices = [f"NodeName=node[0-1] Name=gpu File={device}\n" for device in _DEVICES]
    (folder / "gres.conf").write_text("".join(devices))


def _wait_for_nodes(cluster: SlurmCluster) -> None:
    deadline_s = time.monotonic() + _DAEMON_S
    said = ""
    while time.monotonic() < deadline_s:
        with start(cluster.hosts.on(0, ["sinfo", "--noheader", "--format=%T %D"])) as process:
            said = "".join(process.communicate(timeout=_COMMAND_S)).strip()
        if said == "idle 2":
            return
        time.sleep(0.1)
    logs = [path.read_text()[-2000:] for path in sorted(cluster.folder.glob("daemon-*.log"))]
    raise AssertionError(f"the nodes do not come up: {said}: {logs}")
