"""Whether ranks of this host can sum: as many processes meet and all-reduce as a deployment would have."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from launch.devices import choose_all_reduce, place_on_gpu, prepare_shared_memory
from launch.doctor.finding import NO_TIME, Finding, bad, ok, refused, silent, skipped, warning
from launch.doctor.hosts import interface_of
from launch.doctor.request import DoctorRequest
from launch.doctor.trial import LEAST_S, Trial
from launch.run_dir import trial_dir
from tprt.distributed.factory import CollectiveBackend
from tprt.errors import ConfigError

_NAME = "all-reduce"
_LONGEST_S = 6.0
# No group on CUDA devices is judged that had less: each rank initialises CUDA anew.
_LEAST_ON_GPUS_S, _LONGEST_ON_GPUS_S = 3.0, 30.0
_ON_CPU: tuple[CollectiveBackend, ...] = ("shm", "gloo")
_FIXES: dict[CollectiveBackend, str] = {
    "shm": "see whether seccomp or gVisor forbids memfd_create, or set parallel.all_reduce: gloo",
    "gloo": "bring the loopback interface up (ip link set lo up), or set parallel.all_reduce: shm on CPUs",
    "symm_mem": "set parallel.all_reduce: nccl, or gloo where ranks share a GPU",
}


def check_all_reduce(request: DoctorRequest) -> Iterator[Finding]:
    """Sum by the backend of the deployment over all ranks and over fewer, then by others for CPU ranks."""
    if request.num_ranks == 1:
        yield skipped(_NAME, "one rank has nobody to sum with")
        return
    if request.expects_cuda and not request.gpus:
        yield skipped(_NAME, "it is not known which devices there are: see devices")
        return
    num_gpus = request.gpus.get("visible", 0) if torch.version.cuda else 0
    try:
        used = _choose(request, num_gpus)
        os.environ["GLOO_SOCKET_IFNAME"] = interface_of(request.config.hosts)
    except (ConfigError, OSError) as error:
        yield refused(_NAME, error, "set parallel.all_reduce: auto, and hosts.rdzv_endpoint to a known address")
        return
    prepare_shared_memory(request.config.parallel)
    with trial_dir() as folder:
        yield from _try_all(used, num_gpus, folder, request)


def _try_all(used: CollectiveBackend, num_gpus: int, folder: Path, request: DoctorRequest) -> Iterator[Finding]:
    """Try the backend that the deployment uses, but for NCCL, and those for CPU ranks that it does not."""
    if used != "nccl":
        yield from _try_used(Trial(used, num_gpus, folder), request)
    for other in _ON_CPU:
        if other != used:
            yield _try_other(Trial(other, 0, folder), request)


def _choose(request: DoctorRequest, num_gpus: int) -> CollectiveBackend:
    """Return what the ranks will sum by.

    Raises:
        ConfigError: it does not work for these ranks.
    """
    parallel, any_shared = request.config.parallel, False
    if num_gpus or request.config.runtime.device == "cuda":
        last = request.num_ranks - 1
        any_shared = place_on_gpu(last, request.num_ranks, num_gpus, parallel.allow_shared_gpu).any_shared
    device = "cuda" if num_gpus else "cpu"
    are_linked = request.gpus.get("linked", False)
    return choose_all_reduce(parallel.all_reduce, device, any_shared, are_linked, request.is_spread)


def _try_used(trial: Trial, request: DoctorRequest) -> Iterator[Finding]:
    """Try all ranks, and then fewer: by the same processes, or by new ones if these have failed."""
    name, fix, num_ranks = f"{_NAME} {trial.backend}", _FIXES[trial.backend], request.num_ranks
    longest_s, least_s = (_LONGEST_ON_GPUS_S, _LEAST_ON_GPUS_S) if trial.num_gpus else (_LONGEST_S, LEAST_S)
    timeout_s = request.left_s(longest_s)
    if timeout_s < least_s:
        yield skipped(name, NO_TIME)
        return
    # What is shared by symm_mem belongs to the first group of a process.
    smaller = range(2, num_ranks) if trial.backend != "symm_mem" else ()
    groups = trial.run([num_ranks, *smaller], timeout_s)
    began_s = time.monotonic()
    _, problem = next(groups)
    seconds = time.monotonic() - began_s
    if problem:
        if seconds < timeout_s:
            yield bad(name, problem, fix)
        elif timeout_s < longest_s:
            yield warning(name, f"{problem} in {timeout_s:.1f} s", f"try again with --timeout-s 60; {fix}")
        else:
            yield silent(name, problem, fix)
        groups.close()
        groups = trial.run(smaller, request.left_s(_LONGEST_S))
    else:
        text = f"{num_ranks} ranks met and summed in {seconds:.1f} s"
        yield ok(name, text, world_size=num_ranks, seconds=round(seconds, 3))
    if smaller:
        yield _smaller_groups(f"{name}, fewer", dict(groups), len(smaller), fix)
    groups.close()


def _smaller_groups(name: str, problems: dict[int, str], num_sizes: int, fix: str) -> Finding:
    """Say how many of the groups with fewer ranks work."""
    fine = [size for size, problem in problems.items() if not problem]
    failed = [problem for problem in problems.values() if problem]
    if failed:
        works = f"; {fine[-1]} ranks work" if fine else ""
        return warning(name, f"{failed[0]}{works}", fix)
    untried = f"; no time for {num_sizes - len(fine)} more sizes" if len(fine) < num_sizes else ""
    if not fine:
        return skipped(name, NO_TIME)
    return ok(name, f"groups of {', '.join(map(str, fine))} ranks sum as well{untried}", world_sizes=fine)


def _try_other(trial: Trial, request: DoctorRequest) -> Finding:
    """Try a backend that the deployment does not use."""
    name = f"{_NAME} {trial.backend}"
    timeout_s = request.left_s(_LONGEST_S)
    if timeout_s < LEAST_S:
        return skipped(name, NO_TIME)
    began_s = time.monotonic()
    (_, problem), *_ = trial.run([request.num_ranks], timeout_s)
    if problem and timeout_s < _LONGEST_S and time.monotonic() - began_s >= timeout_s:
        return skipped(name, NO_TIME)
    if problem:
        return warning(name, f"{problem}; this deployment does not need it", _FIXES[trial.backend])
    return ok(name, f"{request.num_ranks} ranks met and summed; this deployment does not need it")
