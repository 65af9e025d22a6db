"""A reading end of a shared-memory ring; `tprt.transport.shm_ring` has the rules.

Knows nothing of what messages mean.
"""

from __future__ import annotations

import os
import select
import time

from tprt.errors import PeerLostError, SequenceGapError, TransportError, TransportTimeoutError
from tprt.transport.large_message import LargeMessageReceiver
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

_HOT_POLLS = 100
_SPIN_NS = 50_000
# `try_receive` waits this long for a large message whose marker it has met: it is under way already.
_LARGE_WAIT_S = 5.0

# The words are enums for people; the hot path wants plain ints.
_READ, _ACTIVE_NS, _PID = int(ReaderWord.READ), int(ReaderWord.ACTIVE_NS), int(ReaderWord.PID)
_SIZE, _IS_MARKER = int(SlotWord.SIZE), int(SlotWord.IS_MARKER)


class RingReader:
    """One receiving end of a ring."""

    def __init__(
        self, fds: RingFds, reader: int, writer: str, large: LargeMessageReceiver | None = None
    ) -> None:
        """Open the ring.

        Args:
            fds: descriptors of the ring, which stay the caller's; this reader's eventfd is the only one.
            reader: which reader this is.
            writer: what to call the writer in an error.
            large: the lane for messages that outgrow a slot; closed with the reader.
        """
        assert len(fds.wake) == 1, "a reader sleeps on its own eventfd"
        self._map = RingMap(fds.memory)
        self._wake, self._room = fds.wake[0], fds.room
        self._writer = writer
        self._large = large
        self._words = self._map.words
        self._line = self._map.reader_line(reader)
        self._published = self._map.writer_line() + WriterWord.PUBLISHED
        self._next: int = self._words[self._line + _READ] + 1
        self._is_lost = False
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._words[self._line + _ACTIVE_NS] = time.monotonic_ns()
        self._words[self._line + _PID] = os.getpid()

    def watch(self, fd: int) -> None:
        """Take the hang-up of the connected socket `fd` for the loss of the writer."""
        self._poll.register(fd, 0)

    def fileno(self) -> int:
        """A descriptor that becomes readable when a message may be there; `try_receive` decides.

        Wait on it only after `try_receive` has returned None.
        """
        return self._wake

    def receive(self, timeout_s: float) -> bytes:
        """Wait for the next message and return a copy of it.

        Raises:
            TransportTimeoutError: nothing came in time.
            PeerLostError: the writer is gone and nothing is left to read.
            SequenceGapError: another message than the next one came.
        """
        deadline_s = time.monotonic() + timeout_s
        if not self.spin():
            self._sleep(deadline_s, timeout_s)
        return self._take(deadline_s)

    def try_receive(self) -> bytes | None:
        """Return the next message if it is there; see `receive` for what is raised."""
        words, published = self._words, self._published
        if words[published] < self._next:
            empty_counter(self._wake)
            # Once more: what was published in between may have been in the counter that is empty now.
            if words[published] < self._next:
                return None
        return self._take(time.monotonic() + _LARGE_WAIT_S)

    def spin(self) -> bool:
        """Look for the next message for some tens of microseconds; return whether it is there."""
        words, published, wanted = self._words, self._published, self._next
        for _ in range(_HOT_POLLS):
            if words[published] >= wanted:
                return True
        clock, sched_yield = time.monotonic_ns, os.sched_yield
        until_ns = clock() + _SPIN_NS
        while clock() < until_ns:
            if words[published] >= wanted:
                return True
            # Where there are more processes than cores, the core may be what the writer waits for.
            sched_yield()
        return False

    def _sleep(self, deadline_s: float, timeout_s: float) -> None:
        """Wait in the kernel until the next message is there."""
        words = self._words
        words[self._line + _ACTIVE_NS] = time.monotonic_ns()
        while words[self._published] < self._next:
            self._raise_if_lost()
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(
                    f"{self._writer} has sent nothing for {timeout_s:g} s; waiting for message {self._next}"
                )
            self._poll_events(left_s * 1000)

    def _poll_events(self, timeout_ms: float) -> None:
        for fd, _ in self._poll.poll(timeout_ms):
            if fd == self._wake:
                empty_counter(fd)
            else:
                self._is_lost = True

    def _raise_if_lost(self) -> None:
        if self._is_lost:
            raise PeerLostError(f"{self._writer} is gone; the last message read was {self._next - 1}")

    def _check_writer(self) -> None:
        self._poll_events(0)
        self._raise_if_lost()

    def _take(self, deadline_s: float) -> bytes:
        """Copy the next message, which is there, and give its slot back."""
        fence()
        words, sequence = self._words, self._next
        start = self._map.slot_start(sequence)
        word = start // WORD_BYTES
        found, size = words[word], words[word + _SIZE]
        if found != sequence:
            raise SequenceGapError(f"message {found} from {self._writer} came; expected message {sequence}")
        if words[word + _IS_MARKER]:
            message = self._receive_large(sequence, size, deadline_s)
        else:
            message = self._map.data[start + LINE_BYTES : start + LINE_BYTES + size]
        fence()
        words[self._line + _ACTIVE_NS] = time.monotonic_ns()
        words[self._line + _READ] = sequence
        self._next = sequence + 1
        os.eventfd_write(self._room, 1)
        return message

    def _receive_large(self, sequence: int, size: int, deadline_s: float) -> bytes:
        if self._large is None:
            raise TransportError(
                f"message {sequence} of {size} bytes is not in the ring; there is no other lane"
            )
        return self._large.receive(sequence, size, deadline_s, self._check_writer)

    def close(self) -> None:
        """Release the memory and the lane for large messages; idempotent."""
        self._map.close()
        if self._large is not None:
            self._large.close()
