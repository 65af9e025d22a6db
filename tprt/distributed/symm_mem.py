"""Collectives between CUDA devices of one host that can read each other's memory, or between ranks on one.

Sums and gathers are kernels over PyTorch's symmetric memory: a few microseconds, and CUDA graphs can hold them.
A small sum is done in one shot, a larger one in two, and one beyond that by the group underneath, where that is
nccl and faster. What is larger than a half of the memory is done in pieces. Everything else goes to the group:
gloo where ranks share a device, which nccl refuses.

NVLink multicast is not used. Knows nothing of where the limits come from (`tuning`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symm_mem

from tprt.distributed.all_reduce_limits import NO_LIMIT, AllReduceLimits
from tprt.distributed.torch_collectives import TorchCollectives
from tprt.errors import TransportError

HALF_BYTES = 16 * 2**20
_UNMEASURED = AllReduceLimits(256 * 1024, NO_LIMIT)
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SymmMemCollectives:
    """One rank's end; see `Collectives` for the methods.

    A rank that waits in a kernel does not see that a peer is lost: supervision ends it. The deadline of a
    kernel is the last resort, an error of the device.

    Args:
        rank: this rank.
        devices: names of all ranks' devices, the same name where they share one.
        device: where the tensors of this rank are.
        group: the process's default group, of the same ranks; it is closed with this object.
        timeout_s: longest wait for the other ranks in a kernel.

    Attributes:
        limits: which sums are done which way; the same on every rank.

    Raises:
        TransportError: the memory cannot be shared.
    """

    capturable = True

    def __init__(
        self, rank: int, devices: list[str], device: torch.device, group: TorchCollectives, timeout_s: float
    ) -> None:
        # Triton is there where CUDA is.
        from tprt.distributed import symm_mem_kernels as kernels
        from tprt.distributed import symm_mem_words as words

        world_size = len(devices)
        if world_size > kernels.MAX_WORLD_SIZE:
            raise TransportError(
                f"symm_mem joins up to {kernels.MAX_WORLD_SIZE} ranks, and there are {world_size}; take nccl"
            )
        self.limits = _UNMEASURED
        self.devices = devices
        self.device = device
        self.group = group
        self._kernels = kernels
        self._words = words
        # Held, because the addresses are good for as long.
        words_offset = kernels.FLAG_BYTES + 2 * HALF_BYTES
        self._memory, self._handle = _share(words_offset + words.words_bytes(world_size), device)
        self._halves = kernels.SharedHalves(
            rank=rank,
            world_size=world_size,
            addresses=torch.tensor(list(self._handle.buffer_ptrs), dtype=torch.int64, device=device),
            counts=torch.zeros(kernels.NUM_PROGRAMS, dtype=torch.int64, device=device),
            half_bytes=HALF_BYTES,
            words_offset=words_offset,
            timeout_ns=int(timeout_s * 1e9),
        )
        # Nobody posts to flags that are not cleared yet.
        torch.cuda.synchronize(device)
        group.barrier()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place and return it."""
        if not self._kernels.can_sum(tensor.dtype) or tensor.nbytes > self.limits.two_shot_bytes:
            return self.group.all_reduce(tensor)
        if tensor.nbytes <= self.limits.one_shot_bytes:
            return self.sum_one_shot(tensor)
        return self.sum_two_shot(tensor)

    def sum_one_shot(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` in place, every rank all of it; return it."""
        if self._words.can_sum_words(tensor):
            self._words.sum_words(tensor, self._halves)
            return tensor
        return self._in_pieces(tensor, self._kernels.sum_one_shot)

    def sum_two_shot(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` in place, every rank a part of it; return it."""
        return self._in_pieces(tensor, self._kernels.sum_two_shot)

    def _in_pieces(self, tensor: Tensor, add: Any) -> Tensor:
        whole = tensor.contiguous()
        flat, step = whole.view(-1), HALF_BYTES // tensor.element_size()
        for start in range(0, flat.numel(), step):
            add(flat[start : start + step], self._halves)
        return tensor if whole is tensor else tensor.copy_(whole)

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """Return the tensors of all ranks concatenated along `dim`, where rank r's has size `sizes[r]`."""
        dim %= tensor.dim()
        shapes = [(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]) for size in sizes]
        numels = [math.prod(shape) for shape in shapes]
        longest = max(numels)
        rows = tensor.new_empty((len(sizes), longest))
        as_numbers = _WHOLE_NUMBERS[tensor.element_size()]
        own, into = tensor.contiguous().view(-1).view(as_numbers), rows.view(as_numbers)
        step = HALF_BYTES // tensor.element_size()
        for start in range(0, longest, step):
            num_elements = min(step, longest - start)
            self._kernels.gather(into[:, start:], own[start : start + step], num_elements, self._halves)
        parts = zip(rows, numels, shapes, strict=True)
        return torch.cat([row[:numel].view(shape) for row, numel, shape in parts], dim)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Overwrite `tensor` with that of rank `src` and return it."""
        return self.group.broadcast(tensor, src)

    def min_int(self, value: int) -> int:
        """Return the least `value`, a signed 64-bit integer, of all ranks."""
        return self.group.min_int(value)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.group.barrier()

    def close(self) -> None:
        """Release the group; idempotent. The memory goes with the process: a peer may still read it."""
        self.group.close()


def _share(num_bytes: int, device: torch.device) -> tuple[Tensor, Any]:
    """Return memory, zeroed, and the handle that knows where all ranks' memory is."""
    group = dist.group.WORLD
    assert group is not None, "the default group is there"
    try:
        memory = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
        memory.zero_()
        return memory, symm_mem.rendezvous(memory, group)
    except RuntimeError as error:
        raise TransportError(
            f"symm_mem cannot share memory with the devices of the other ranks: {error}; take"
            " parallel.all_reduce: nccl"
        ) from error
