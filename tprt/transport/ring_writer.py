"""The writing end of a shared-memory ring; `tprt.transport.shm_ring` has the rules.

Knows nothing of what messages mean.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError
from tprt.transport.channel import Buffer
from tprt.transport.large_message import LargeMessageSender
from tprt.transport.memory_order import fence
from tprt.transport.shm_ring import (
    LINE_BYTES,
    WORD_BYTES,
    ReaderWord,
    RingFds,
    RingMap,
    SlotWord,
    WriterWord,
    empty_counter,
)

# The words are enums for people; the hot path wants plain ints.
_READ, _ACTIVE_NS, _PID = int(ReaderWord.READ), int(ReaderWord.ACTIVE_NS), int(ReaderWord.PID)
_SIZE, _IS_MARKER = int(SlotWord.SIZE), int(SlotWord.IS_MARKER)


class RingWriter:
    """The one sender of a ring."""

    def __init__(self, fds: RingFds, readers: Sequence[str], large: LargeMessageSender | None = None) -> None:
        """Open the ring.

        Args:
            fds: descriptors of the ring, which stay the caller's; all readers' eventfds are among them.
            readers: what to call each reader in an error, such as `rank 3`.
            large: the lane for messages that outgrow a slot; closed with the writer.
        """
        self._map = RingMap(fds.memory)
        assert len(readers) == len(fds.wake) == self._map.num_readers, "a writer wakes and names every reader"
        self._fds = fds
        self._readers = readers
        self._large = large
        self._words = self._map.words
        self._lines = [self._map.reader_line(reader) for reader in range(len(readers))]
        self._published = self._map.writer_line() + WriterWord.PUBLISHED
        self._sequence: int = self._words[self._published]
        self._room_until = 0
        self._loss = ""
        self._watched: dict[int, int] = {}
        self._poll = select.poll()
        self._poll.register(fds.room, select.POLLIN)

    def watch(self, reader: int, fd: int) -> None:
        """Take the hang-up of the connected socket `fd` for the loss of a reader."""
        self._watched[fd] = reader
        self._poll.register(fd, 0)

    def mark_lost(self, reader: int) -> None:
        """Take note that a reader is gone: what is sent from now on raises `PeerLostError`."""
        self._loss = self._loss or f"{self._readers[reader]} is gone: {self._describe(reader)}"

    def send(self, parts: Sequence[Buffer], timeout_s: float) -> None:
        """Send the concatenation of `parts` as one message; nothing is sent when this raises.

        Raises:
            TransportTimeoutError: readers did not make room in time; names them and says how far they are.
            PeerLostError: a reader is gone.
            TransportError: the message does not fit and there is no lane for large ones.
        """
        if self._loss:
            raise PeerLostError(self._loss)
        sequence = self._sequence + 1
        if sequence > self._room_until:
            self._wait_for_room(sequence, timeout_s)
        start = self._map.slot_start(sequence)
        size = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
        is_marker = size > self._map.geometry.slot_bytes
        if is_marker:
            self._send_large(sequence, size, parts)
        else:
            self._store(start + LINE_BYTES, parts)
        words, word = self._words, start // WORD_BYTES
        words[word] = sequence
        words[word + _SIZE] = size
        words[word + _IS_MARKER] = is_marker
        fence()
        words[self._published] = self._sequence = sequence
        for fd in self._fds.wake:
            os.eventfd_write(fd, 1)

    def _store(self, start: int, parts: Sequence[Buffer]) -> None:
        data = self._map.data
        for part in parts:
            end = start + (part.nbytes if isinstance(part, memoryview) else len(part))
            data[start:end] = part
            start = end

    def _send_large(self, sequence: int, size: int, parts: Sequence[Buffer]) -> None:
        if self._large is None:
            raise TransportError(
                f"a message of {size} bytes; this ring takes {self._map.geometry.slot_bytes}:"
                " make its slots larger"
            )
        self._large.send(sequence, parts)

    def _wait_for_room(self, sequence: int, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not self._has_room(sequence):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(
                    f"no room for message {sequence} after {timeout_s:g} s, in a ring of"
                    f" {self._map.geometry.num_slots}: {self.describe_behind(sequence)}"
                )
            for fd, _ in self._poll.poll(left_s * 1000):
                if fd != self._fds.room:
                    self.mark_lost(self._watched[fd])
                    raise PeerLostError(self._loss)
                empty_counter(fd)

    def _has_room(self, sequence: int) -> bool:
        slowest = min(self._words[line] for line in self._lines)
        fence()
        self._room_until = slowest + self._map.geometry.num_slots
        return sequence <= self._room_until

    def describe_behind(self, sequence: int | None = None) -> str:
        """Say which readers are behind and how far they are; empty when none is.

        Args:
            sequence: count those who leave no room for this message; None: all who have something to read.
        """
        needed = self._sequence if sequence is None else sequence - self._map.geometry.num_slots
        behind = [reader for reader, line in enumerate(self._lines) if self._words[line] < needed]
        return "; ".join(f"{self._readers[reader]} {self._describe(reader)}" for reader in behind)

    def _describe(self, reader: int) -> str:
        line = self._lines[reader]
        read, active_ns, pid = (self._words[line + word] for word in (_READ, _ACTIVE_NS, _PID))
        if not pid:
            return "has not opened the ring"
        age_s = (time.monotonic_ns() - active_ns) / 1e9
        return (
            f"(process {pid}) has read up to message {read} of {self._sequence}, last active {age_s:.1f} s ago"
        )

    def close(self) -> None:
        """Release the memory and the lane for large messages; idempotent."""
        self._loss = self._loss or "this end of the ring is closed"
        self._map.close()
        if self._large is not None:
            self._large.close()
