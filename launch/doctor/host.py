"""Limits of this host and of the container around this process: files, locked memory, CPUs, NUMA nodes."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from launch.doctor.finding import Finding, bad, ok, refused, skipped, warning
from launch.doctor.request import DoctorRequest
from launch.run_dir import trial_dir
from tprt.errors import ConfigError
from tprt.host_limits import cpu_quota

_NODES = Path("/sys/devices/system/node")
_INFINIBAND = Path("/sys/class/infiniband")
_MIB = 2**20
# Descriptors of a rank or the coordinator: 15 to 35 are counted at four ranks, 5 more for each rank.
_FILES, _FILES_OF_A_RANK = 64, 8
# Those of the server that are no connections.
_FILES_OF_THE_SERVER = 64
# What NCCL registers with InfiniBand devices is its buffers; more than the usual 8 MiB, less than this.
_REGISTERED_BYTES = 64 * _MIB


def check_host(request: DoctorRequest) -> Iterator[Finding]:
    """Look at what the system allows a process and its children."""
    yield _run_directory()
    yield _open_files(request)
    yield _connections(request)
    yield _locked_memory(request)
    yield _cpus(request)
    yield _numa(request)


def _run_directory() -> Finding:
    try:
        with trial_dir() as folder:
            return ok("run directory", f"sockets go to {folder.parent}, which can be written")
    except ConfigError as error:
        return refused("run directory", error, "set TMPDIR to a writable folder with a short path")


def _open_files(request: DoctorRequest) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_files = len(list(Path(request.config.model.path).glob("*.safetensors")))
    # Each rank opens every file of the checkpoint twice: through the page cache and past it.
    needed = _FILES + _FILES_OF_A_RANK * request.config.parallel.tensor_parallel_size + 2 * num_files
    text = f"a process may open {soft} files (hard limit {hard}); a rank or the coordinator needs {needed}"
    details = {"soft": soft, "hard": hard, "needed": needed}
    if soft < needed:
        return bad("open files", text, f"ulimit -n {max(needed, 4096)} (systemd: LimitNOFILE=)", **details)
    return ok("open files", text, **details)


def _connections(request: DoctorRequest) -> Finding:
    """Compare connections with the hard limit, which the server takes for itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = request.config
    most = config.scheduler.max_num_seqs + config.server.max_queued_requests
    text = f"the server takes up to {most} requests at a time, and may open {hard} files"
    if hard < most + _FILES_OF_THE_SERVER:
        fix = f"raise the hard limit (ulimit -Hn {2 * most}), or lower server.max_queued_requests"
        return warning("connections", text, fix, hard=hard, requests=most)
    return ok("connections", text, hard=hard, requests=most)


def _locked_memory(request: DoctorRequest) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_limited = soft != resource.RLIM_INFINITY
    text = f"a process may lock {soft // _MIB} MiB" if is_limited else "a process may lock any memory"
    has_infiniband = _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())
    if request.expects_cuda and has_infiniband and is_limited and soft < _REGISTERED_BYTES:
        found = f"{text}, and NCCL registers its buffers with the InfiniBand devices here"
        return warning("memlock", found, "ulimit -l unlimited (Docker: --ulimit memlock=-1)", soft=soft)
    return ok("memlock", f"{text}; only NCCL over InfiniBand needs more than a few MiB", soft=soft)


def _cpus(request: DoctorRequest) -> Finding:
    """Compare the CPUs that may be used with the ranks and their threads."""
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    usable = min(float(allowed), quota or allowed)
    num_ranks = request.num_processes
    threads = request.config.runtime.num_threads or max(1, allowed // num_ranks)
    limit = "no cgroup quota" if quota is None else f"a cgroup quota of {quota:g} CPUs"
    text = f"{allowed} CPUs, {limit}, for {num_ranks} ranks with {threads} threads each"
    details = {"cpus": allowed, "quota": quota, "threads_per_rank": threads}
    if usable < num_ranks:
        fix = "raise the quota (Docker: --cpus) or the CPU set, or lower parallel.tensor_parallel_size"
        return warning("CPUs", f"{text}: ranks take turns, and each waits for all", fix, **details)
    if not request.expects_cuda and usable < num_ranks * threads:
        fix = f"set runtime.num_threads: {max(1, int(usable) // num_ranks)}"
        return warning("CPUs", f"{text}: more threads than CPUs stop one another", fix, **details)
    return ok("CPUs", text, **details)


def _numa(request: DoctorRequest) -> Finding:
    try:
        nodes = {node.name: _parse_cpus((node / "cpulist").read_text()) for node in _NODES.glob("node[0-9]*")}
    except OSError as error:
        return skipped("NUMA", f"the nodes cannot be read: {error}")
    allowed = os.sched_getaffinity(0)
    used = {name: len(cpus & allowed) for name, cpus in sorted(nodes.items()) if cpus & allowed}
    if not nodes:
        return skipped("NUMA", "this kernel tells of no nodes")
    shares = ", ".join(f"{count} on {name}" for name, count in used.items())
    text = f"nodes: {len(nodes)}; CPUs that may be used: {shares}"
    if len(used) > 1 and not request.expects_cuda:
        fix = "bind the deployment to a node (numactl --cpunodebind=0 --membind=0) or spread its memory"
        return warning("NUMA", f"{text}; ranks are not bound to nodes", f"{fix} (--interleave=all)", cpus=used)
    return ok("NUMA", text, cpus=used)


def _parse_cpus(text: str) -> set[int]:
    """Return the numbers of a list such as `0-3,8`."""
    parts = [part.partition("-") for part in text.strip().split(",") if part]
    return {number for first, _, last in parts for number in range(int(first), int(last or first) + 1)}
