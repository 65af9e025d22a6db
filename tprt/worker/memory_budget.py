"""Where the memory of one rank's device goes: measured, or planned, and what is left for KV blocks.

Bytes throughout. Knows nothing of models: what is run to find out the workspace is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from tprt.errors import ConfigError

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes of one rank's device.

    Attributes:
        total: what the device has; on a CPU, what the KV blocks of this rank may take.
        limit: what may be in use once this rank is up: `cache.memory_fraction` of `total`.
        others: in use by other programs, and by this one for what is no tensor (context, NCCL).
        weights: of this rank, with what the allocator rounds up and the tables of the rotary embedding.
        workspace: the most that a step takes besides, at the limits of the scheduler.
        graphs: CUDA graphs.
    """

    total: int
    limit: int
    others: int = 0
    weights: int = 0
    workspace: int = 0
    graphs: int = 0

    @property
    def available(self) -> int:
        """What is left for KV blocks; below 0 when the rest already takes more than `limit`."""
        return self.limit - self.others - self.weights - self.workspace - self.graphs

    def num_blocks(self, block_bytes: int) -> int:
        """Return how many KV blocks of `block_bytes` fit."""
        return max(0, self.available) // block_bytes

    def table(self, kv_bytes: int) -> list[str]:
        """Return the lines of a table that says where the memory goes when KV blocks take `kv_bytes`."""
        used = self.others + self.weights + self.workspace + self.graphs + kv_bytes
        rows = [
            ("total", self.total),
            ("in use by others", self.others),
            ("weights", self.weights),
            ("workspace", self.workspace),
            ("CUDA graphs", self.graphs),
            ("KV blocks", kv_bytes),
            ("left over", self.total - used),
        ]
        return [f"{name:<17}{gib(size):>12}" for name, size in rows if size or name == "KV blocks"]


class DeviceMemory(Protocol):
    """What can be asked of a device and of the allocator in front of it."""

    def free_and_total(self) -> tuple[int, int]:
        """Return what nobody uses, and what the device has."""

    def settled(self) -> tuple[int, int]:
        """Return the same while no other rank of the device changes it; every rank must call it."""

    def reserved(self) -> int:
        """Return what the allocator has taken from the device."""

    def allocated(self) -> int:
        """Return what tensors take."""

    def start_peak(self) -> None:
        """Forget the peak."""

    def peak(self) -> int:
        """Return the most that tensors took since `start_peak`."""

    def release_unused(self) -> None:
        """Give back what the allocator keeps for later."""


class CudaMemory:
    """`DeviceMemory` of a CUDA device, as torch tells it; ranks that share one have equal parts of it.

    They have equal parts of what is free, too: what one holds more than another counts there as used by others,
    so all of them come to the same that is left.

    Args:
        device: of this rank.
        num_sharers: ranks on it, this one included.
        meet: returns when every rank has called it.
    """

    def __init__(
        self, device: torch.device, num_sharers: int = 1, meet: Callable[[], None] = lambda: None
    ) -> None:
        self._device = device
        self._num_sharers = num_sharers
        self._meet = meet

    def free_and_total(self) -> tuple[int, int]:
        """Ask the driver, which knows of other programs too."""
        free, total = torch.cuda.mem_get_info(self._device)
        return int(free) // self._num_sharers, int(total) // self._num_sharers

    def settled(self) -> tuple[int, int]:
        """Return `free_and_total` while no rank takes or gives back memory; all ranks together."""
        torch.cuda.synchronize(self._device)
        self._meet()
        found = self.free_and_total()
        self._meet()
        return found

    def reserved(self) -> int:
        """Return `torch.cuda.memory_reserved`."""
        return torch.cuda.memory_reserved(self._device)

    def allocated(self) -> int:
        """Return `torch.cuda.memory_allocated`."""
        return torch.cuda.memory_allocated(self._device)

    def start_peak(self) -> None:
        """Reset torch's peak."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Return torch's peak, once the device has done what it was given."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def release_unused(self) -> None:
        """Empty torch's cache."""
        torch.cuda.empty_cache()


def measure_budget(memory: DeviceMemory, memory_fraction: float, run_step: Callable[[], None]) -> MemoryBudget:
    """Find out what is really free for KV blocks, with the weights loaded and no KV blocks yet.

    What is in use by others is read after `run_step`, since a first step makes libraries allocate.

    Args:
        memory: of the device.
        memory_fraction: share of the device that may be in use.
        run_step: runs the largest step that the scheduler can send.

    Raises:
        ConfigError: the step itself does not fit.
    """
    memory.release_unused()
    weights, before = memory.reserved(), memory.allocated()
    memory.start_peak()
    try:
        run_step()
    except torch.OutOfMemoryError as error:
        free, total = memory.free_and_total()
        raise ConfigError(
            f"the weights take {gib(weights)} of {gib(total)}, {gib(free)} are free: that is too little for a"
            " step of the largest size; lower scheduler.max_num_batched_tokens and scheduler.max_num_seqs, use"
            " more ranks or a smaller model, or end what else uses the device"
        ) from error
    workspace = memory.peak() - before
    memory.release_unused()
    free, total = memory.settled()
    return MemoryBudget(
        total=total,
        limit=int(total * memory_fraction),
        others=total - free - memory.reserved(),
        weights=weights,
        workspace=workspace,
    )


def gib(size: int) -> str:
    """Return `size` for people: GiB, or MiB where that says more."""
    return f"{size / _GIB:.2f} GiB" if abs(size) >= _GIB / 10 else f"{size / 2**20:.2f} MiB"
