"""What memory each planned rank will find: as given on the command line, or as the devices of this host tell.

Knows nothing of what the memory is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.cuda_devices import CudaDevice, gpu_in_turn
from tprt.errors import ConfigError

_GIB = 2**30
# Allowances: what CUDA, its libraries and loaded kernels take of a device without any tensor, and NCCL's
# buffers where there are several ranks. A start measures both and writes them into its log.
CONTEXT_BYTES = _GIB // 2
NCCL_BYTES = _GIB // 2


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank's device, and those that its tensors will not get."""

    total: int
    others: int


def parse_memory_gib(values: Sequence[str], num_ranks: int, num_replicas: int = 1) -> list[int]:
    """Return the bytes of the device of each rank of each replica from GiB, one by one or separated by commas.

    Raises:
        ConfigError: a value is no number above 0, or there is neither one for all, nor one for each rank of a
            replica, nor one for each of all.
    """
    try:
        sizes = [int(float(part) * _GIB) for value in values for part in value.split(",")]
    except (ValueError, OverflowError):
        sizes = []
    if not sizes or min(sizes) <= 0:
        raise ConfigError(f"--memory-gib {' '.join(values)}: expected GiB above 0, such as 80 or 80,80,48")
    num_devices = num_ranks * num_replicas
    if len(sizes) not in (1, num_ranks, num_devices):
        several = f" in each of {num_replicas} replicas" if num_replicas > 1 else ""
        raise ConfigError(
            f"--memory-gib has {len(sizes)} values for {num_ranks} ranks{several}; give one for all, or one for"
            " each"
        )
    return sizes * (num_devices // len(sizes))


def given_memory(totals: Sequence[int]) -> list[RankMemory]:
    """Return the memory of ranks on devices that nobody else uses."""
    return [RankMemory(total, overhead_bytes(len(totals))) for total in totals]


def detected_memory(devices: Sequence[CudaDevice], num_ranks: int) -> list[RankMemory]:
    """Return the memory of ranks on `devices`, whose context this process has opened as a rank would.

    Ranks beyond the devices of this host are planned for with the least of them.
    """
    found = [
        RankMemory(device.total, max(device.total - device.free, CONTEXT_BYTES) + _nccl_bytes(num_ranks))
        for device in devices[:num_ranks]
    ]
    least = min(found, key=lambda memory: memory.total - memory.others)
    return found + [least] * (num_ranks - len(found))


def shared_memory(devices: Sequence[CudaDevice], num_ranks: int) -> list[RankMemory]:
    """Return the memory of more ranks than `devices`, which share them in turn: of each an equal part."""
    found = []
    for rank in range(num_ranks):
        index, num_sharers = gpu_in_turn(rank, num_ranks, len(devices))
        device = devices[index]
        foreign = max(0, device.total - device.free - CONTEXT_BYTES) // num_sharers
        found.append(RankMemory(device.total // num_sharers, foreign + overhead_bytes(num_ranks)))
    return found


def memory_of_ranks(
    devices: Sequence[CudaDevice], num_ranks: int, allow_shared_gpu: bool
) -> list[RankMemory] | None:
    """Return the memory of ranks on the devices of this host, which they share or not; None without any."""
    if not devices:
        return None
    is_shared = allow_shared_gpu and num_ranks > len(devices)
    return (shared_memory if is_shared else detected_memory)(devices, num_ranks)


def overhead_bytes(num_ranks: int) -> int:
    """Return what a rank takes of its device beside tensors."""
    return CONTEXT_BYTES + _nccl_bytes(num_ranks)


def _nccl_bytes(num_ranks: int) -> int:
    return NCCL_BYTES if num_ranks > 1 else 0
