"""The shared memory of one group of CPU ranks: its layout, and the descriptors by which it is passed on.

A memfd has no name: nothing can collide, nothing is left behind, and `/dev/shm` is not used up. Beside it
goes one eventfd per rank, on which the others wake that rank. Knows nothing of tensors or of waiting.

    header line    magic, version, world size, bytes of a slot
    rank lines     one line of 64 bytes per rank, words of 8 bytes, see `Word`
    slots          [NUM_BUFFERS, world_size] staging slots of `slot_bytes`, from the next page on
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from enum import IntEnum

from tprt.errors import TransportError

MAX_WORLD_SIZE = 64
NUM_BUFFERS = 3
DEFAULT_SLOT_BYTES = 512 * 1024
LINE_BYTES = 64
LINE_WORDS = LINE_BYTES // 8

_HEADER = struct.Struct("<QQQQ")
_MAGIC = int.from_bytes(b"tprtcoll", "little")
_VERSION = 1


class Word(IntEnum):
    """Place of a word in a rank's line; only that rank writes there (PID: also who hands the memory on)."""

    ROUND = 0
    """Number of the last round that the rank has posted; it only grows."""
    WANTED = 1
    """The round that the rank sleeps for, or 0."""
    SIGNATURE = 2
    """Two words, for odd and even rounds: what the rank does in that round."""
    COLLECTIVE = 4
    """Number of the last collective that the rank has begun."""
    PID = 5
    """Process id, or 0 before the rank is known."""
    CLOSED = 6
    """1 once the rank has closed the group."""


def line_start(rank: int) -> int:
    """Return the index of the first word of a rank's line, in words from the start of the memory."""
    return (rank + 1) * LINE_WORDS


def slots_start(world_size: int) -> int:
    """Return where the slots begin, in bytes from the start of the memory."""
    page = mmap.PAGESIZE
    return -(-(world_size + 1) * LINE_BYTES // page) * page


def group_bytes(world_size: int, slot_bytes: int = DEFAULT_SLOT_BYTES) -> int:
    """Return the bytes of a group's memory; `slot_bytes` is rounded up to whole pages."""
    return slots_start(world_size) + NUM_BUFFERS * world_size * _whole_pages(slot_bytes)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class ShmGroupMemory:
    """The descriptors of a group's memory: one process creates it, the others get the descriptors.

    Pass `fds` to another process (`subprocess` `pass_fds`, `socket.send_fds`) and build its view with
    `from_fds`. Collectives map the memory for themselves, so this object may be closed once they exist.

    Attributes:
        world_size: number of ranks.
        slot_bytes: bytes of one staging slot, a multiple of the page size.
        memory_fd: the memfd.
        doorbell_fds: `[world_size]` eventfds, one for each rank to be woken by.
    """

    def __init__(self, memory_fd: int, doorbell_fds: Sequence[int], slot_bytes: int) -> None:
        self.memory_fd = memory_fd
        self.doorbell_fds = tuple(doorbell_fds)
        self.world_size = len(self.doorbell_fds)
        self.slot_bytes = slot_bytes

    @classmethod
    def create(cls, world_size: int, slot_bytes: int = DEFAULT_SLOT_BYTES) -> ShmGroupMemory:
        """Create zeroed memory for `world_size` ranks; `slot_bytes` is rounded up to whole pages.

        Raises:
            TransportError: `world_size` is out of range.
        """
        if not 2 <= world_size <= MAX_WORLD_SIZE:
            raise TransportError(f"shared memory for {world_size} ranks: expected from 2 to {MAX_WORLD_SIZE}")
        memory_fd = os.memfd_create("tprt-collectives", os.MFD_CLOEXEC)
        os.ftruncate(memory_fd, group_bytes(world_size, slot_bytes))
        slot_bytes = _whole_pages(slot_bytes)
        os.pwrite(memory_fd, _HEADER.pack(_MAGIC, _VERSION, world_size, slot_bytes), 0)
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        return cls(memory_fd, [os.eventfd(0, flags) for _ in range(world_size)], slot_bytes)

    @classmethod
    def from_fds(cls, fds: Sequence[int]) -> ShmGroupMemory:
        """Take over descriptors in the order of `fds`, from the process that created the memory.

        Raises:
            TransportError: the first one is not such a memory, or their number does not fit it.
        """
        header = os.pread(fds[0], _HEADER.size, 0) if fds else b""
        magic, version, world_size, slot_bytes = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
        if (magic, version) != (_MAGIC, _VERSION) or len(fds) != world_size + 1:
            raise TransportError(
                f"{len(fds)} descriptors with magic {magic:#x}, version {version}, world size {world_size};"
                f" expected a tprt collectives memory, version {_VERSION}, and an eventfd per rank, as in `fds`"
            )
        return cls(fds[0], fds[1:], slot_bytes)

    @property
    def fds(self) -> tuple[int, ...]:
        """The memory and then the doorbells: what another process needs."""
        return (self.memory_fd, *self.doorbell_fds)

    def map(self) -> mmap.mmap:
        """Map the whole memory; the caller closes the mapping."""
        return mmap.mmap(self.memory_fd, os.fstat(self.memory_fd).st_size)

    def set_pid(self, rank: int, pid: int) -> None:
        """Note a rank's process before it has mapped the memory, so that its loss is seen from the start."""
        os.pwrite(self.memory_fd, struct.pack("<Q", pid), (line_start(rank) + Word.PID) * 8)

    def close(self) -> None:
        """Close the descriptors; idempotent. Mappings live on."""
        fds = self.fds if self.memory_fd >= 0 else ()
        self.memory_fd = -1
        for fd in fds:
            os.close(fd)
