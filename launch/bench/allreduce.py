"""Measures how long CPU ranks of this host take to sum a tensor: shared memory beside gloo, in one run.

Both are measured by the same processes in turns, so that what else the machine does falls on both. Knows
nothing of how the results are shown.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from launch.bench.bench_dir import bench_dir
from launch.bench.out_of_reach import start_out_of_reach
from launch.program_end import PutOffEnd
from tprt.distributed.factory import CollectiveBackend, GroupDeadlines, make_group
from tprt.distributed.tp_group import TPGroup
from tprt.errors import ConfigError, TransportError

BenchRow = dict[str, int | float | None]
PlayRank = Callable[[int, int, str, Sequence[int], Connection], None]
"""What a rank does: rank, number of ranks, run directory, sizes, and where rank 0 sends its rows."""

_BACKENDS: tuple[CollectiveBackend, ...] = ("shm", "gloo")
_NUM_TURNS = 4
_MAX_BYTES_PER_TURN = 64 * 1024 * 1024
_MAX_CALLS_PER_TURN = 250
_MIN_CALLS_PER_TURN = 10
_START_TIMEOUT_S = 60.0
_ROW_TIMEOUT_S = 60.0
# For a rank that is about to end.
_END_S = 1.0


def run_allreduce_bench(readers: list[int], num_bytes: list[int]) -> list[BenchRow]:
    """Measure an all-reduce of float32 between ranks that have one thread each and call it back to back.

    Args:
        readers: numbers of ranks, each measured in processes of its own.
        num_bytes: sizes of the tensor, in bytes; multiples of 4.

    Returns:
        One row for each number of ranks and size: `ranks`, `num_bytes`, `calls` of each backend, and for shm
        and gloo `<backend>_p50_us` and `<backend>_p99_us`, the time of one call on rank 0.

    Raises:
        ConfigError: a size or number of ranks makes no sense.
        TransportError: a rank failed.
    """
    if min(num_bytes) < 4 or any(size % 4 for size in num_bytes) or min(readers) < 2:
        raise ConfigError(
            f"all-reduce bench of {num_bytes} bytes on {readers} ranks: expected multiples of 4 bytes (float32)"
            " and 2 ranks or more"
        )
    return [row for world_size in readers for row in bench_ranks(_play_rank, world_size, num_bytes)]


def bench_ranks(play_rank: PlayRank, world_size: int, num_bytes: Sequence[int]) -> list[BenchRow]:
    """Run `play_rank` in a process for each rank; return the row that rank 0 sends for each size.

    Raises:
        TransportError: a rank failed, or there was no row in time.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with receiver, bench_dir() as run_dir:
        processes = [
            context.Process(target=play_rank, args=(rank, world_size, run_dir, num_bytes, sender), daemon=True)
            for rank in range(world_size)
        ]
        with _running(processes):
            sender.close()
            return [_receive_row(receiver, processes) for _ in num_bytes]


def _start(processes: Sequence[SpawnProcess]) -> None:
    """Start the ranks; a signal that comes meanwhile acts once all are there to be ended."""
    # The process of multiprocessing itself comes first, since its start takes SIGINT out of the mask.
    resource_tracker.ensure_running()
    with PutOffEnd() as end:
        start_out_of_reach(processes)
    end.catch_up()


@contextmanager
def _running(processes: Sequence[SpawnProcess]) -> Iterator[None]:
    """Start the ranks, and leave none of them behind."""
    try:
        _start(processes)
        yield
        for process in processes:
            process.join(_START_TIMEOUT_S)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _receive_row(receiver: Connection, processes: Sequence[SpawnProcess]) -> BenchRow:
    ready = wait([receiver, *(process.sentinel for process in processes)], _START_TIMEOUT_S + _ROW_TIMEOUT_S)
    if receiver in ready:
        # Where all ranks have ended there is nothing but the end of the pipe.
        with contextlib.suppress(EOFError):
            row: BenchRow = receiver.recv()
            return row
    for process in processes:
        process.join(_END_S)
    ended = [f"rank {rank} ended with {p.exitcode}" for rank, p in enumerate(processes) if p.exitcode]
    raise TransportError(f"the all-reduce bench gave no result: {', '.join(ended) or 'no rank answers'}")


def _play_rank(rank: int, world_size: int, run_dir: str, num_bytes: Sequence[int], sender: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    deadlines = GroupDeadlines(_START_TIMEOUT_S, _START_TIMEOUT_S)
    groups = [make_group(name, rank, world_size, cpu, run_dir, deadlines) for name in _BACKENDS]
    for size in num_bytes:
        row = _measure(groups, size)
        if rank == 0:
            sender.send(row)
    for group in groups:
        group.barrier()
    for group in groups:
        group.close()


def _measure(groups: Sequence[TPGroup], num_bytes: int) -> BenchRow:
    tensor = torch.zeros(num_bytes // 4)
    calls = min(max(_MAX_BYTES_PER_TURN // num_bytes, _MIN_CALLS_PER_TURN), _MAX_CALLS_PER_TURN)
    times_s: list[list[float]] = [[] for _ in groups]
    with torch.inference_mode():
        for _ in range(_NUM_TURNS):
            for group, times in zip(groups, times_s, strict=True):
                times.extend(_time_turn(group, tensor, calls))
    row: BenchRow = {"ranks": groups[0].world_size, "num_bytes": num_bytes, "calls": calls * _NUM_TURNS}
    for name, times in zip(_BACKENDS, times_s, strict=True):
        times.sort()
        row[f"{name}_p50_us"] = round(times[len(times) // 2] * 1e6, 1)
        row[f"{name}_p99_us"] = round(times[len(times) * 99 // 100] * 1e6, 1)
    return row


def _time_turn(group: TPGroup, tensor: torch.Tensor, calls: int) -> list[float]:
    group.barrier()
    for _ in range(_MIN_CALLS_PER_TURN // 2):
        group.all_reduce(tensor)
    times_s = []
    for _ in range(calls):
        start_s = time.perf_counter()
        group.all_reduce(tensor)
        times_s.append(time.perf_counter() - start_s)
    return times_s
