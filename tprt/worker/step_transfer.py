"""One copy a step: columns are laid side by side in pinned memory and go to the device together.

On a CPU a column is its own tensor. Knows nothing of what columns mean.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Kernels that read 16 bytes at a time want their operands there.
_ALIGNMENT = 16
# While the device reads one step's columns, the next step's are written.
_NUM_PINNED = 2
_FIRST_BYTES = 64 * 1024


class StepTransfer:
    """Takes the columns of one step after another: `begin`, `stage` each, `flush`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cpu = device.type == "cpu"
        self._pinned = [_PinnedBuffer(device) for _ in range(0 if self._is_cpu else _NUM_PINNED)]
        self._turn = 0
        self._used = 0
        self._on_device: Tensor

    def begin(self, num_bytes: int) -> None:
        """Begin a step whose columns have at most `num_bytes` bytes in all."""
        if self._is_cpu:
            return
        self._turn = (self._turn + 1) % _NUM_PINNED
        self._pinned[self._turn].reserve(num_bytes)
        self._on_device = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._used = 0

    def stage(self, column: NDArray[np.generic]) -> Tensor:
        """Return the tensor that holds `column` on the device after `flush`."""
        if self._is_cpu:
            return torch.from_numpy(column if column.flags.writeable else column.copy())
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        host = torch.from_numpy(column if column.flags.writeable else column.copy()).contiguous()
        self._used = start + host.nbytes
        self._pinned[self._turn].memory[start : self._used].view(host.dtype).view(host.shape).copy_(host)
        return self._on_device[start : self._used].view(host.dtype).view(host.shape)

    def flush(self) -> None:
        """Send what has been staged; nothing waits for it."""
        if not self._is_cpu and self._used:
            self._pinned[self._turn].send(self._on_device[: self._used])


def staged_bytes(num_bytes: int, num_columns: int) -> int:
    """Return the room that columns of `num_bytes` in all need at most."""
    return num_bytes + num_columns * _ALIGNMENT


def wait_for(event: torch.cuda.Event) -> None:
    """Wait for `event`, without a call that may sleep where it is past, as it mostly is."""
    if not event.query():  # type: ignore[no-untyped-call]
        event.synchronize()


class _PinnedBuffer:
    """Pinned memory that is written again only after the device has read it."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._device = device
        self._was_read = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def reserve(self, num_bytes: int) -> None:
        wait_for(self._was_read)
        if len(self.memory) < num_bytes:
            self.memory = torch.empty(max(num_bytes, _FIRST_BYTES), dtype=torch.uint8, pin_memory=True)

    def send(self, dest: Tensor) -> None:
        dest.copy_(self.memory[: len(dest)], non_blocking=True)
        self._was_read.record(torch.cuda.current_stream(self._device))
