"""Measures how long ranks on GPUs of this host take to sum a tensor: by symm_mem, and by nccl where it works.

The same processes measure all ways. Knows nothing of how the results are shown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch

from launch.bench.allreduce import BenchRow, bench_ranks
from launch.cuda_devices import look_from_outside
from launch.devices import choose_device, prepare_shared_memory
from tprt.config import ParallelConfig
from tprt.distributed.factory import GroupDeadlines, make_group
from tprt.distributed.symm_mem import SymmMemCollectives
from tprt.distributed.tuning import time_captured
from tprt.errors import ConfigError

CUDA_BYTES = ",".join(str(4**power * 1024) for power in range(9))
"""1 KiB to 64 MiB."""

_NUM_CALLS = 20
_NUM_REPLAYS = 9
_TIMEOUT_S = 60.0


def run_cuda_allreduce_bench(readers: list[int], num_bytes: list[int]) -> list[BenchRow]:
    """Measure an all-reduce of bfloat16 between ranks that do nothing else.

    Args:
        readers: numbers of ranks, each measured in processes of its own.
        num_bytes: sizes of the tensor, in bytes; multiples of 2.

    Returns:
        One row for each number of ranks and size: `ranks`, `gpus`, `num_bytes`, and microseconds of one call on
        rank 0, the median: `<way>_us` inside a CUDA graph and `<way>_eager_us` launched back to back. `nccl` is
        None where ranks share a GPU.

    Raises:
        ConfigError: there is no GPU, or a size or number of ranks makes no sense.
        TransportError: a rank failed.
    """
    if min(num_bytes) < 2 or any(size % 2 for size in num_bytes) or min(readers) < 2:
        raise ConfigError(
            f"all-reduce bench of {num_bytes} bytes on {readers} ranks: expected multiples of 2 bytes"
            " (bfloat16) and 2 ranks or more"
        )
    if not look_from_outside():
        raise ConfigError("--device cuda: no CUDA device is visible; take --device cpu")
    return [row for world_size in readers for row in bench_ranks(_play_rank, world_size, num_bytes)]


def _play_rank(rank: int, world_size: int, run_dir: str, num_bytes: Sequence[int], sender: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    prepare_shared_memory(ParallelConfig(allow_shared_gpu=True))
    device = choose_device("cuda", rank, world_size, allow_shared_gpu=True).device
    group = make_group("symm_mem", rank, world_size, device, run_dir, GroupDeadlines(_TIMEOUT_S, _TIMEOUT_S))
    assert isinstance(group.collectives, SymmMemCollectives)
    with torch.inference_mode():
        for size in num_bytes:
            row = _measure(group.collectives, size)
            if rank == 0:
                sender.send(row)
    group.barrier()
    group.close()


def _measure(collectives: SymmMemCollectives, num_bytes: int) -> BenchRow:
    tensor = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=collectives.device)
    ways: dict[str, Callable[[], object] | None] = {
        "one_shot": lambda: collectives.sum_one_shot(tensor),
        "two_shot": lambda: collectives.sum_two_shot(tensor),
        "nccl": (lambda: collectives.group.all_reduce(tensor)) if collectives.group.capturable else None,
    }
    num_ranks, num_gpus = len(collectives.devices), len(set(collectives.devices))
    row: BenchRow = {"ranks": num_ranks, "gpus": num_gpus, "num_bytes": num_bytes}
    for name, call in ways.items():
        captured = None if call is None else sorted(time_captured(call, _NUM_CALLS, _NUM_REPLAYS))
        row[f"{name}_us"] = None if captured is None else round(captured[_NUM_REPLAYS // 2], 2)
    for name, call in ways.items():
        row[f"{name}_eager_us"] = None if call is None else round(_time_eager(collectives, call), 1)
    return row


def _time_eager(collectives: SymmMemCollectives, call: Callable[[], object]) -> float:
    """Return the microseconds of one call of many that are launched back to back: the median of some rounds."""
    times_us = []
    for _ in range(_NUM_REPLAYS):
        collectives.barrier()
        started_s = time.perf_counter()
        for _ in range(_NUM_CALLS):
            call()
        torch.cuda.synchronize(collectives.device)
        times_us.append((time.perf_counter() - started_s) * 1e6 / _NUM_CALLS)
    return sorted(times_us)[_NUM_REPLAYS // 2]
