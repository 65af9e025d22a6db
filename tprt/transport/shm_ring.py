"""A ring in shared memory: one writer, N readers, every reader gets every message once and in order.

The memory is a memfd, so it has no name to collide or leak and takes nothing of /dev/shm. Layout: a line of
64 bytes for the writer (messages published), one for each reader (messages read, monotonic nanoseconds of its
last look), then the slots, each with a line of its own (sequence number, length, flags) before the payload.
Who is behind, and by how much, can be read off the lines.

**Wake-ups.** After publishing, the writer adds to each reader's eventfd; after reading, a reader adds to the
writer's. Both always do, whether or not anyone sleeps, so there is no flag to race with: a counter that the
kernel keeps cannot lose a wake-up. A reader looks at the ring for some tens of microseconds and then sleeps.

**Memory order.** A payload must be visible before its sequence number, and be read before the slot is given
back. x86-64 keeps stores in order and loads in order (Intel SDM 3A, 8.2.2), and aligned 8-byte accesses are
single there. Elsewhere `_fence` orders: it takes and gives back a lock twice. What came before cannot sink
below the first release, what comes after cannot rise above the second acquire, and an acquire of a lock is
ordered after the release that it reads from.

Messages that outgrow a slot go through `overflow`, a lane of their own, and leave a marker here, so that the
order holds. Knows nothing of what messages mean and of how the descriptors reach the other process.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tprt.errors import SequenceGapError, TransportError, TransportTimeoutError
from tprt.transport.channel import Buffer

_LINE_WORDS = 8
_LINE_BYTES = 64
_WORD_BYTES = 8
_OVERFLOW = 1
_SPIN_NS = 40_000
# A sleeper wakes this often to look at its deadline and at the other side; wake-ups do not depend on it.
_LONGEST_SLEEP_S = 1.0
# A marker is written just before its message is sent.
_OVERFLOW_WAIT_S = 60.0
_IS_ORDERED = platform.machine() in ("x86_64", "AMD64")
_FENCE_LOCK = threading.Lock()


def _fence() -> None:
    """Order all memory accesses before it with all after it; free where the machine orders them anyway."""
    if not _IS_ORDERED:
        for _ in range(2):
            _FENCE_LOCK.acquire()
            _FENCE_LOCK.release()


@dataclass(frozen=True, slots=True)
class RingGeometry:
    """The size of a ring: `num_slots` slots for messages of up to `slot_bytes`."""

    num_slots: int = 8
    slot_bytes: int = 256 * 1024

    def __post_init__(self) -> None:
        if self.num_slots < 1 or self.slot_bytes < _LINE_BYTES or self.slot_bytes % _LINE_BYTES:
            raise TransportError(
                f"a ring of {self.num_slots} slots of {self.slot_bytes} bytes; expected at least one slot of a"
                f" multiple of {_LINE_BYTES}"
            )

    def total_bytes(self, num_readers: int) -> int:
        """Return the bytes of the whole ring."""
        return (1 + num_readers) * _LINE_BYTES + self.num_slots * (_LINE_BYTES + self.slot_bytes)


class OverflowWriter(Protocol):
    """The sending end of the lane for messages that outgrow a slot."""

    def send(self, sequence: int, payload: bytes, timeout_s: float) -> None:
        """Send message number `sequence` to every reader."""

    def close(self) -> None:
        """Release everything; idempotent."""


class OverflowReader(Protocol):
    """One receiving end of that lane."""

    def receive(self, sequence: int, timeout_s: float) -> bytes:
        """Return message number `sequence`."""

    def close(self) -> None:
        """Release everything; idempotent."""


@dataclass(frozen=True, slots=True)
class RingFds:
    """The descriptors of a ring: its memory, one eventfd for each reader, one for the writer."""

    memory: int
    readers: tuple[int, ...]
    writer: int

    @classmethod
    def create(cls, geometry: RingGeometry, num_readers: int) -> RingFds:
        """Make a ring that nobody has used yet."""
        memory = os.memfd_create("tprt-ring", os.MFD_CLOEXEC)
        os.ftruncate(memory, geometry.total_bytes(num_readers))
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        return cls(memory, tuple(os.eventfd(0, flags) for _ in range(num_readers)), os.eventfd(0, flags))

    def close(self) -> None:
        """Close all of them."""
        for fd in (self.memory, *self.readers, self.writer):
            os.close(fd)


class _Ring:
    """The mapped memory, as words and as bytes."""

    def __init__(self, fd: int, geometry: RingGeometry, num_readers: int) -> None:
        self.geometry = geometry
        self.num_readers = num_readers
        self._map = mmap.mmap(fd, geometry.total_bytes(num_readers))
        self.data = memoryview(self._map)
        self.words = self.data.cast("Q")
        self._slots_start = (1 + num_readers) * _LINE_BYTES

    def reader_word(self, reader: int) -> int:
        """Return where reader's line begins, in words: messages read, then time of its last look."""
        return (1 + reader) * _LINE_WORDS

    def slot_start(self, sequence: int) -> int:
        """Return where the slot of message `sequence` (from 1) begins, in bytes."""
        index = (sequence - 1) % self.geometry.num_slots
        return self._slots_start + index * (_LINE_BYTES + self.geometry.slot_bytes)

    def close(self) -> None:
        self.words.release()
        self.data.release()
        self._map.close()


class RingWriter:
    """The one sender. `check_readers` raises `PeerLostError` when a reader is gone; `watched` wake it."""

    def __init__(
        self, fds: RingFds, geometry: RingGeometry, num_readers: int, overflow: OverflowWriter | None = None
    ) -> None:
        self._ring = _Ring(fds.memory, geometry, num_readers)
        self._fds = fds
        self._overflow = overflow
        self._sequence = 0
        self._poller = select.poll()
        self._poller.register(fds.writer, select.POLLIN)
        self._check_readers: Callable[[], None] = lambda: None

    def watch_readers(self, fds: Sequence[int], check: Callable[[], None]) -> None:
        """While waiting for room, also wake when one of `fds` is readable, and then call `check`."""
        for fd in fds:
            self._poller.register(fd, select.POLLIN)
        self._check_readers = check

    def send(self, parts: Sequence[Buffer], timeout_s: float) -> None:
        """Send the concatenation of `parts`; see `tprt.transport.channel.Writer.send`."""
        deadline_s = time.monotonic() + timeout_s
        sequence = self._sequence + 1
        self._wait_for_room(sequence, deadline_s, timeout_s)
        size = sum(len(part) for part in parts)
        is_large = size > self._ring.geometry.slot_bytes
        if is_large and self._overflow is None:
            raise TransportError(f"a message of {size} bytes; this ring takes {self._ring.geometry.slot_bytes}")
        self._publish(sequence, size, () if is_large else parts)
        self._sequence = sequence
        if is_large and self._overflow is not None:
            self._overflow.send(sequence, b"".join(parts), deadline_s - time.monotonic())

    def _publish(self, sequence: int, size: int, parts: Sequence[Buffer]) -> None:
        ring = self._ring
        start = ring.slot_start(sequence)
        at = start + _LINE_BYTES
        for part in parts:
            end = at + len(part)
            ring.data[at:end] = part
            at = end
        word = start // _WORD_BYTES
        ring.words[word + 1] = size
        ring.words[word + 2] = 0 if parts or not size else _OVERFLOW
        _fence()
        ring.words[word] = sequence
        ring.words[0] = sequence
        for eventfd in self._fds.readers:
            os.eventfd_write(eventfd, 1)

    def _wait_for_room(self, sequence: int, deadline_s: float, timeout_s: float) -> None:
        needed = sequence - self._ring.geometry.num_slots
        while self._slowest() < needed:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(self._describe_slow(needed, timeout_s))
            for fd, _ in self._poller.poll(min(left_s, _LONGEST_SLEEP_S) * 1000):
                if fd == self._fds.writer:
                    _drain(fd)
                else:
                    self._check_readers()
        _fence()

    def _slowest(self) -> int:
        ring = self._ring
        return min((ring.words[ring.reader_word(r)] for r in range(ring.num_readers)), default=self._sequence)

    def _describe_slow(self, needed: int, timeout_s: float) -> str:
        ring, now_ns = self._ring, time.monotonic_ns()
        behind = []
        for reader in range(ring.num_readers):
            read, looked_ns = ring.words[ring.reader_word(reader)], ring.words[ring.reader_word(reader) + 1]
            if read < needed:
                ago = f"last active {(now_ns - looked_ns) / 1e9:.1f} s ago" if looked_ns else "never active"
                behind.append(f"reader {reader} has read message {read} of {self._sequence}, {ago}")
        return f"no room in the ring for {timeout_s:g} s: {'; '.join(behind)}"

    def close(self) -> None:
        """Release the memory and the descriptors; idempotent."""
        if self._sequence >= 0:
            self._sequence = -1
            self._ring.close()
            self._fds.close()
            if self._overflow is not None:
                self._overflow.close()


class RingReader:
    """One receiving end. `fds.readers` holds this reader's own eventfd alone."""

    def __init__(
        self,
        fds: RingFds,
        geometry: RingGeometry,
        place: tuple[int, int],
        overflow: OverflowReader | None = None,
    ) -> None:
        """Open the ring as reader `place[0]` of `place[1]`."""
        self._reader, num_readers = place
        self._ring = _Ring(fds.memory, geometry, num_readers)
        self._fds = fds
        self._overflow = overflow
        self._line = self._ring.reader_word(self._reader)
        self._sequence: int = self._ring.words[self._line]
        self._is_open = True
        self._poller = select.poll()
        self._poller.register(fds.readers[0], select.POLLIN)
        self._check_writer: Callable[[], None] = lambda: None

    def watch_writer(self, fd: int, check: Callable[[], None]) -> None:
        """While waiting, also wake when `fd` is readable, and then call `check`, which may raise."""
        self._poller.register(fd, select.POLLIN)
        self._check_writer = check

    def unwatch(self, fd: int) -> None:
        """Watch `fd` no longer."""
        self._poller.unregister(fd)

    def fileno(self) -> int:
        """A descriptor that becomes readable when a message may be there."""
        return self._fds.readers[0]

    def receive(self, timeout_s: float) -> bytes:
        """Wait for the next message; see `tprt.transport.channel.Reader.receive`."""
        deadline_s = time.monotonic() + timeout_s
        message = self.spin(min(timeout_s, _SPIN_NS / 1e9))
        while message is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(
                    f"no message for {timeout_s:g} s; the last one read was number {self._sequence}"
                )
            others = self.sleep(left_s)
            message = self.try_receive()
            if message is None and others:
                self._check_writer()
        return message

    def spin(self, duration_s: float) -> bytes | None:
        """Look at the ring again and again for `duration_s`."""
        words, published, last = self._ring.words, 0, self._sequence
        until_ns = time.monotonic_ns() + int(duration_s * 1e9)
        while published <= last and time.monotonic_ns() < until_ns:
            published = words[0]
        return self.try_receive()

    def sleep(self, timeout_s: float) -> bool:
        """Sleep until a message may be there; return whether the other descriptor woke it."""
        self._ring.words[self._line + 1] = time.monotonic_ns()
        woken = [fd for fd, _ in self._poller.poll(min(timeout_s, _LONGEST_SLEEP_S) * 1000)]
        if self._fds.readers[0] in woken:
            _drain(self._fds.readers[0])
        return any(fd != self._fds.readers[0] for fd in woken)

    def try_receive(self) -> bytes | None:
        """Return the next message if it is there."""
        ring, sequence = self._ring, self._sequence + 1
        if ring.words[0] < sequence:
            return None
        _fence()
        start = ring.slot_start(sequence)
        word = start // _WORD_BYTES
        found, size, flags = ring.words[word], ring.words[word + 1], ring.words[word + 2]
        if found != sequence:
            raise SequenceGapError(f"reader {self._reader} found message {found}; expected {sequence}")
        if flags & _OVERFLOW:
            message = self._receive_large(sequence, size)
        else:
            message = bytes(ring.data[start + _LINE_BYTES : start + _LINE_BYTES + size])
        self._acknowledge(sequence)
        return message

    def _receive_large(self, sequence: int, size: int) -> bytes:
        if self._overflow is None:
            raise TransportError(f"message {sequence} of {size} bytes is not in the ring")
        message = self._overflow.receive(sequence, _OVERFLOW_WAIT_S)
        if len(message) != size:
            raise SequenceGapError(f"message {sequence} has {len(message)} bytes; its marker says {size}")
        return message

    def _acknowledge(self, sequence: int) -> None:
        self._sequence = sequence
        _fence()
        self._ring.words[self._line + 1] = time.monotonic_ns()
        self._ring.words[self._line] = sequence
        os.eventfd_write(self._fds.writer, 1)

    def close(self) -> None:
        """Release the memory and the descriptors; idempotent."""
        if self._is_open:
            self._is_open = False
            self._ring.close()
            self._fds.close()
            if self._overflow is not None:
                self._overflow.close()


def _drain(eventfd: int) -> None:
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return
