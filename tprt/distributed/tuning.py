"""Measures, at the first start on some devices, which way of summing is fastest for which size.

Sums are timed inside CUDA graphs, where decode steps have them. Rank 0 decides for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from tprt.distributed.all_reduce_limits import NO_LIMIT, AllReduceLimits, LimitsFile, SumTimes, limits_from
from tprt.distributed.symm_mem import SymmMemCollectives
from tprt.distributed.tp_group import TPGroup
from tprt.log import get_logger

_LOG = get_logger(__name__)
# Measured with these; a change to the kernels is a new version.
_VERSION = 3
_SIZES = tuple(4**power * 1024 for power in range(1, 9))
_CALLS = 10
_LARGE_CALLS = 3
_LARGE_BYTES = 8 * 2**20
_REPLAYS = 5


def tune_all_reduce(group: TPGroup, folder: Path) -> None:
    """Set the limits of a symm_mem group to what is fastest here, kept in `folder`; all ranks together.

    A group of another kind has nothing to choose.
    """
    collectives = group.collectives
    if not isinstance(collectives, SymmMemCollectives):
        return
    topology = {"version": _VERSION, "torch": torch.__version__, "devices": collectives.devices}
    file = LimitsFile(folder, topology)
    limits = _of_rank_0(group, file.read())
    if limits is None:
        _compile(collectives)
        started_s = time.monotonic()
        # The large ones first: a device that has been idle is slow in the beginning.
        times = [_time_size(collectives, num_bytes) for num_bytes in reversed(_SIZES)][::-1]
        torch.cuda.empty_cache()
        limits = _of_rank_0(group, limits_from(times))
        assert limits is not None, "rank 0 has measured"
        if group.rank == 0:
            _keep(file, limits, times)
            _LOG.info(
                "measured sums between %d ranks in %.2f s", group.world_size, time.monotonic() - started_s
            )
    collectives.limits = limits
    if group.rank == 0:
        beyond = "beyond" if limits.two_shot_bytes == NO_LIMIT else f"up to {limits.two_shot_bytes}, then nccl"
        _LOG.info("sums: one shot up to %d bytes, two %s", limits.one_shot_bytes, beyond)


def _of_rank_0(group: TPGroup, limits: AllReduceLimits | None) -> AllReduceLimits | None:
    """Return what rank 0 has; -1 stands for nothing."""
    if group.rank:
        found = group.min_int(NO_LIMIT), group.min_int(NO_LIMIT)
    elif limits is None:
        found = group.min_int(-1), group.min_int(-1)
    else:
        found = group.min_int(limits.one_shot_bytes), group.min_int(limits.two_shot_bytes)
    return None if found[0] < 0 else AllReduceLimits(*found)


def _keep(file: LimitsFile, limits: AllReduceLimits, times: list[SumTimes]) -> None:
    try:
        file.write(limits, times)
    except OSError as error:
        _LOG.warning("the measured sums cannot be kept in %s: %s", file.path, error)


def _compile(collectives: SymmMemCollectives) -> None:
    """Sum once as small and as large as later on, so that what is compiled for every start is not counted."""
    for num_bytes in _SIZES:
        tensor = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=collectives.device)
        collectives.sum_two_shot(collectives.sum_one_shot(tensor))
    torch.cuda.synchronize(collectives.device)


def _time_size(collectives: SymmMemCollectives, num_bytes: int) -> SumTimes:
    tensor = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=collectives.device)
    group = collectives.group
    return SumTimes(
        num_bytes=num_bytes,
        one_shot_us=_least_us(collectives.sum_one_shot, tensor),
        two_shot_us=_least_us(collectives.sum_two_shot, tensor),
        group_us=_least_us(group.all_reduce, tensor) if group.capturable else None,
    )


def _least_us(add: Callable[[Tensor], Tensor], tensor: Tensor) -> float:
    num_calls = _LARGE_CALLS if tensor.nbytes > _LARGE_BYTES else _CALLS
    return min(time_captured(lambda: add(tensor), num_calls, _REPLAYS))


def time_captured(call: Callable[[], object], num_calls: int, num_replays: int) -> list[float]:
    """Return the microseconds of one `call`, of `num_calls` in a CUDA graph, in each replay of it."""
    call()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(num_calls):
            call()
    marks = [_timing_event() for _ in range(num_replays + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e3 / num_calls for before, after in pairwise(marks)]


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
