"""Whether ranks of this host can sum: as many processes meet and all-reduce as a deployment would have."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from launch.cuda_driver import are_gpus_linked
from launch.devices import choose_all_reduce, place_on_gpu, prepare_shared_memory
from launch.doctor.finding import NO_TIME, Finding, bad, ok, refused, silent, skipped, warning
from launch.doctor.forked import ask_child, ask_children
from launch.doctor.hosts import interface_of
from launch.doctor.request import DoctorRequest
from launch.doctor.trial import LEAST_S, Trial
from launch.run_dir import RunDir
from tprt.distributed.factory import CollectiveBackend
from tprt.errors import ConfigError

_NAME = "all-reduce"
_LONGEST_S = 6.0
# What is tried in a process of its own gives up by itself, and is heard a little later.
_TO_TELL_S = 0.3
_ON_CPU: tuple[CollectiveBackend, ...] = ("shm", "gloo")
_FIXES: dict[CollectiveBackend, str] = {
    "shm": "see whether seccomp or gVisor forbids memfd_create, or set parallel.all_reduce: gloo",
    "gloo": "bring the loopback interface up (ip link set lo up), or set parallel.all_reduce: shm on CPUs",
    "nccl": "see what NCCL says with NCCL_DEBUG=WARN; try NCCL_P2P_DISABLE=1; give the container more /dev/shm;"
    " disable PCIe ACS and the IOMMU",
    "symm_mem": "set parallel.all_reduce: nccl, or gloo where ranks share a GPU",
}


def check_all_reduce(request: DoctorRequest) -> Iterator[Finding]:
    """Sum by the backend of the deployment over all ranks and over fewer, then by others for CPU ranks."""
    if request.num_ranks == 1:
        yield skipped(_NAME, "one rank has nobody to sum with")
        return
    num_gpus, are_linked = 0, False
    if request.expects_cuda:
        look = partial(_look_at_gpus, request.num_ranks)
        num_gpus, are_linked = ask_child(look, request.left_s(_LONGEST_S)) or (0, False)
    try:
        used = _choose(request, num_gpus, are_linked)
        os.environ["GLOO_SOCKET_IFNAME"] = interface_of(request.config.hosts)
    except (ConfigError, OSError) as error:
        yield refused(_NAME, error, "set parallel.all_reduce: auto, and hosts.rdzv_endpoint to a known address")
        return
    prepare_shared_memory(request.config.parallel)
    run_dir = RunDir.create(is_trial=True)
    try:
        yield from _try_all(used, num_gpus, run_dir.path, request)
    finally:
        run_dir.remove()


def _try_all(used: CollectiveBackend, num_gpus: int, folder: Path, request: DoctorRequest) -> Iterator[Finding]:
    """Try the backends that the deployment uses, and those for CPU ranks that it does not."""
    backends = [used]
    if used == "symm_mem" and num_gpus >= request.num_ranks:
        # It carries what symm_mem does not.
        backends.append("nccl")
    tries: list[Callable[[], Iterator[Finding]]]
    tries = [partial(_try_used, Trial(backend, num_gpus, folder), request) for backend in backends]
    others = [Trial(other, 0, folder) for other in _ON_CPU if other != used]
    tries.append(lambda: (_try_other(trial, request) for trial in others))
    if not num_gpus:
        # They would be in each other's way on the same CPUs.
        yield from chain.from_iterable(one() for one in tries)
        return
    # To open a device takes longer than all sums on it, so those of one backend do not wait for another.
    names = [*(f"{_NAME} {backend}" for backend in backends), f"{_NAME} on CPUs"]
    answers = ask_children([partial(_all_of, one) for one in tries], request.left_s(_LONGEST_S) + _TO_TELL_S)
    for name, backend, answer in zip(names, [*backends, _ON_CPU[-1]], answers, strict=True):
        if isinstance(answer, Exception):
            yield silent(name, str(answer), _FIXES[backend])
        else:
            yield from answer


def _all_of(attempt: Callable[[], Iterator[Finding]]) -> list[Finding]:
    return list(attempt())


def _look_at_gpus(num_ranks: int) -> tuple[int, bool]:
    """Return how many GPUs this process sees, and whether those of the ranks are linked."""
    num_gpus = torch.cuda.device_count()
    if num_gpus:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    return num_gpus, num_gpus > 0 and are_gpus_linked(min(num_ranks, num_gpus))


def _choose(request: DoctorRequest, num_gpus: int, are_linked: bool) -> CollectiveBackend:
    """Return what the ranks will sum by.

    Raises:
        ConfigError: it does not work for these ranks.
    """
    parallel, any_shared = request.config.parallel, False
    if num_gpus or request.config.runtime.device == "cuda":
        last = request.num_ranks - 1
        any_shared = place_on_gpu(last, request.num_ranks, num_gpus, parallel.allow_shared_gpu).any_shared
    device = "cuda" if num_gpus else "cpu"
    return choose_all_reduce(parallel.all_reduce, device, any_shared, are_linked, request.is_spread)


def _try_used(trial: Trial, request: DoctorRequest) -> Iterator[Finding]:
    """Try all ranks, and then fewer: by the same processes, or by new ones if these have failed."""
    name, fix, num_ranks = f"{_NAME} {trial.backend}", _FIXES[trial.backend], request.num_ranks
    timeout_s = request.left_s(_LONGEST_S)
    if timeout_s < LEAST_S:
        yield skipped(name, NO_TIME)
        return
    # What is shared by symm_mem belongs to the first group of a process.
    smaller = range(2, num_ranks) if trial.backend != "symm_mem" else ()
    groups = trial.run([num_ranks, *smaller], timeout_s)
    began_s = time.monotonic()
    _, problem = next(groups)
    seconds = time.monotonic() - began_s
    if problem:
        yield silent(name, problem, fix) if seconds >= timeout_s else bad(name, problem, fix)
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
    (_, problem), *_ = trial.run([request.num_ranks], timeout_s)
    if problem:
        return warning(name, f"{problem}; this deployment does not need it", _FIXES[trial.backend])
    return ok(name, f"{request.num_ranks} ranks met and summed; this deployment does not need it")
