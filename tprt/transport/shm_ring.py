"""A ring in shared memory: one writer, N readers, every reader gets every message once and in order.

Here are the rules, the layout, and the descriptors by which a ring is passed on; `ring_writer` and
`ring_reader` have the two ends. The memory is a memfd: it has no name, so nothing can collide, nothing is left
behind, and /dev/shm is not used up. Beside it go one eventfd for each reader and one for the writer.

    header line     magic, version, readers, slots, payload bytes of a slot
    writer line     see `WriterWord`
    reader lines    one for each reader, see `ReaderWord`
    slots           from the next page on; a line, see `SlotWord`, and the payload

A line is 64 bytes, one cache line, so that nobody's stores disturb another's. Words have 8 bytes.

**Order.** Messages are numbered from 1. The writer puts number n into slot n modulo N once every reader has
read number n - N, so a slot is never overwritten before the slowest reader has copied it; who is behind, and by
how much, can be read off the readers' lines. Each slot carries its number, and a reader checks it.

**Wake-ups.** After it has published a message the writer adds to each reader's eventfd; after it has read one a
reader adds to the writer's. Both always do, whether or not anyone sleeps, so there is no sleeping flag to race
with: who waits empties its counter first, looks at the ring next and sleeps last, and whatever happens after it
has looked is in the counter already. A reader spins for some tens of microseconds before that: a message that
comes soon costs it no system call, and one that comes late costs no CPU until then.

**Memory order.** A payload is stored before its number is published, and is copied out before its slot is given
back: `fence` between the two keeps them so, see `tprt.transport.memory_order` for why that is sound.

**Large messages** go by `tprt.transport.large_message` and leave a marker here, so that the order holds.

**Loss.** An end that is told of a connected socket of the other side (`watch`) sees its hang-up while it waits.

Knows nothing of what messages mean and of how descriptors reach the other process.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from tprt.errors import TransportError

LINE_BYTES = 64
WORD_BYTES = 8
LINE_WORDS = LINE_BYTES // WORD_BYTES
MAX_READERS = 250

_HEADER = struct.Struct("<QQQQQ")
_MAGIC = int.from_bytes(b"tprtring", "little")
_VERSION = 1
_MAX_SLOTS = 65536


class WriterWord(IntEnum):
    """Place of a word in the writer's line; the writer alone writes there."""

    PUBLISHED = 0
    """Number of the last message that is there to be read; the first is 1."""


class ReaderWord(IntEnum):
    """Place of a word in a reader's line; that reader alone writes there."""

    READ = 0
    """Number of the last message that the reader has copied out."""
    ACTIVE_NS = 1
    """Monotonic nanoseconds when the reader last took a message or began to wait for one."""
    PID = 2
    """Process id, or 0 before the reader has opened the ring."""


class SlotWord(IntEnum):
    """Place of a word in a slot's line."""

    SEQUENCE = 0
    """Number of the message in the slot."""
    SIZE = 1
    """Its bytes."""
    IS_MARKER = 2
    """1 when the payload did not fit and goes by the lane for large messages."""


@dataclass(frozen=True, slots=True)
class RingGeometry:
    """The size of a ring: `num_slots` messages, each of up to `slot_bytes`.

    Raises:
        TransportError: there would be no slot, or its size is no positive multiple of 64 bytes.
    """

    num_slots: int = 8
    slot_bytes: int = 256 * 1024

    def __post_init__(self) -> None:
        fits = 1 <= self.num_slots <= _MAX_SLOTS and self.slot_bytes > 0 and self.slot_bytes % LINE_BYTES == 0
        if not fits:
            raise TransportError(
                f"a ring of {self.num_slots} slots of {self.slot_bytes} bytes; expected 1 to {_MAX_SLOTS} slots"
                f" of a positive multiple of {LINE_BYTES} bytes"
            )

    def total_bytes(self, num_readers: int) -> int:
        """Return the bytes of the whole memory."""
        return _slots_start(num_readers) + self.num_slots * (LINE_BYTES + self.slot_bytes)


@dataclass(frozen=True, slots=True)
class RingFds:
    """The descriptors of a ring; whoever holds this closes them.

    Attributes:
        memory: the memfd.
        wake: eventfds that wake readers: all of them for the writer, its own for a reader.
        room: the eventfd that tells the writer that something was read.
    """

    memory: int
    wake: tuple[int, ...]
    room: int

    @classmethod
    def create(cls, geometry: RingGeometry, num_readers: int) -> RingFds:
        """Create an empty ring.

        Raises:
            TransportError: the number of readers is out of range.
        """
        if not 1 <= num_readers <= MAX_READERS:
            raise TransportError(f"a ring for {num_readers} readers; expected 1 to {MAX_READERS}")
        memory = os.memfd_create("tprt-ring", os.MFD_CLOEXEC)
        os.ftruncate(memory, geometry.total_bytes(num_readers))
        header = _HEADER.pack(_MAGIC, _VERSION, num_readers, geometry.num_slots, geometry.slot_bytes)
        os.pwrite(memory, header, 0)
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        return cls(memory, tuple(os.eventfd(0, flags) for _ in range(num_readers)), os.eventfd(0, flags))

    @classmethod
    def from_list(cls, fds: Sequence[int]) -> RingFds:
        """Take over what `to_list` gave in the process that created the ring."""
        memory, *wake, room = fds
        return cls(memory, tuple(wake), room)

    def to_list(self) -> list[int]:
        """Return the descriptors in the order that `from_list` expects."""
        return [self.memory, *self.wake, self.room]

    def of_reader(self, reader: int) -> RingFds:
        """Return what one reader needs."""
        return RingFds(self.memory, (self.wake[reader],), self.room)

    def close(self) -> None:
        """Close them all."""
        for fd in self.to_list():
            os.close(fd)


class RingMap:
    """A ring's memory in the address space of this process.

    Attributes:
        geometry: its size, as its header says.
        num_readers: number of readers.
        data: the whole memory; slicing it copies.
        words: the same, as words of 8 bytes.
    """

    def __init__(self, memory_fd: int) -> None:
        """Map the memory; the descriptor may be closed afterwards.

        Raises:
            TransportError: this is not the memory of a ring of this version.
        """
        found = _HEADER.unpack(os.pread(memory_fd, _HEADER.size, 0).ljust(_HEADER.size, b"\0"))
        magic, version, num_readers, num_slots, slot_bytes = found
        if (magic, version) != (_MAGIC, _VERSION):
            raise TransportError(
                f"a memory with magic {magic:#x} and version {version}; expected a tprt ring of"
                f" version {_VERSION}"
            )
        self.num_readers: int = num_readers
        self.geometry = RingGeometry(num_slots, slot_bytes)
        total_bytes = self.geometry.total_bytes(self.num_readers)
        if (size := os.fstat(memory_fd).st_size) != total_bytes:
            raise TransportError(f"a ring of {size} bytes; its header says {total_bytes}")
        self.data = mmap.mmap(memory_fd, total_bytes)
        self.words = memoryview(self.data).cast("Q")
        self._slots_start = _slots_start(self.num_readers)
        self._num_slots: int = num_slots
        self._stride: int = LINE_BYTES + slot_bytes

    def writer_line(self) -> int:
        """Return the first word of the writer's line."""
        return LINE_WORDS

    def reader_line(self, reader: int) -> int:
        """Return the first word of a reader's line."""
        return (2 + reader) * LINE_WORDS

    def slot_start(self, sequence: int) -> int:
        """Return where the slot of message `sequence` begins, in bytes."""
        return self._slots_start + sequence % self._num_slots * self._stride

    def close(self) -> None:
        """Unmap the memory; idempotent."""
        self.words.release()
        self.data.close()


def _slots_start(num_readers: int) -> int:
    lines = (2 + num_readers) * LINE_BYTES
    return -(-lines // mmap.PAGESIZE) * mmap.PAGESIZE


def empty_counter(eventfd: int) -> None:
    """Set the counter of a non-blocking eventfd to 0."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(eventfd)
