"""Whether ranks of this host can sum: as many processes meet and all-reduce as a deployment would have."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import torch

from launch.child import GLOO_ON_ONE_HOST
from launch.devices import choose_all_reduce
from launch.doctor.finding import Finding, bad, ok, skipped, warning
from launch.doctor.forked import ask_child
from launch.doctor.request import DoctorRequest
from launch.doctor.trial import Trial
from launch.run_dir import RunDir
from tprt.distributed.factory import CollectiveBackend

_NAME = "all-reduce"
_LONGEST_S = 6.0
_ON_CPU: tuple[CollectiveBackend, ...] = ("shm", "gloo")
_FIXES: dict[CollectiveBackend, str] = {
    "shm": "see whether seccomp or gVisor forbids memfd_create, or set parallel.all_reduce: gloo",
    "gloo": "bring the loopback interface up (ip link set lo up), or set parallel.all_reduce: shm on CPUs",
    "nccl": "see what NCCL says with NCCL_DEBUG=WARN; try NCCL_P2P_DISABLE=1; give the container more /dev/shm;"
    " disable PCIe ACS and the IOMMU",
}


def check_all_reduce(request: DoctorRequest) -> Iterator[Finding]:
    """Sum over all ranks by the backend of the deployment, then over fewer, then by others for CPU ranks."""
    if request.num_ranks == 1:
        yield skipped(_NAME, "one rank has nobody to sum with")
        return
    device = "cpu"
    if request.expects_cuda:
        found = ask_child(torch.cuda.device_count, request.left_s(_LONGEST_S)) or 0
        device = "cuda" if found or request.config.runtime.device == "cuda" else "cpu"
        if device == "cuda" and found < request.num_ranks:
            yield skipped(_NAME, f"there are {found} CUDA devices for {request.num_ranks} ranks")
            return
    used = choose_all_reduce(request.config.parallel.all_reduce, device)
    os.environ.update(GLOO_ON_ONE_HOST)
    run_dir = RunDir.create(is_trial=True)
    try:
        trial = Trial(used, device, run_dir.path)
        yield from _try_used(trial, request)
        for other in _ON_CPU:
            if other != used:
                yield _try_other(Trial(other, "cpu", run_dir.path), request)
    finally:
        run_dir.remove()


def _try_used(trial: Trial, request: DoctorRequest) -> Iterator[Finding]:
    name, num_ranks = f"{_NAME} {trial.backend}", request.num_ranks
    smaller = range(2, num_ranks)
    groups = trial.run([num_ranks, *smaller], request.left_s(_LONGEST_S))
    began_s = time.monotonic()
    _, problem = next(groups)
    seconds = time.monotonic() - began_s
    if problem:
        groups.close()
        yield bad(name, problem, _FIXES[trial.backend])
        groups = trial.run(smaller, request.left_s(_LONGEST_S))
    else:
        text = f"{num_ranks} ranks met and summed on {trial.device} in {seconds:.1f} s"
        yield ok(name, text, world_size=num_ranks, seconds=round(seconds, 3))
    if smaller:
        yield _smaller_groups(name, dict(groups), len(smaller), _FIXES[trial.backend])


def _smaller_groups(name: str, problems: dict[int, str], num_sizes: int, fix: str) -> Finding:
    """Say how many of the groups with fewer ranks work."""
    name = f"{name}, fewer"
    fine = [size for size, problem in problems.items() if not problem]
    failed = [problem for problem in problems.values() if problem]
    if failed:
        works = f"; {fine[-1]} ranks work" if fine else ""
        return warning(name, f"{failed[0]}{works}", fix)
    untried = f"; no time for {num_sizes - len(fine)} more sizes" if len(fine) < num_sizes else ""
    if not fine:
        return skipped(name, "no time was left")
    return ok(name, f"groups of {', '.join(map(str, fine))} ranks sum as well{untried}", world_sizes=fine)


def _try_other(trial: Trial, request: DoctorRequest) -> Finding:
    """Try a backend that the deployment does not use."""
    name = f"{_NAME} {trial.backend}"
    (_, problem), *_ = trial.run([request.num_ranks], request.left_s(_LONGEST_S))
    if problem:
        return warning(name, f"{problem}; this deployment does not need it", _FIXES[trial.backend])
    return ok(name, f"{request.num_ranks} ranks met and summed; this deployment does not need it")
