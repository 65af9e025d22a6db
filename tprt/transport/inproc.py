"""The twin of hub and links inside one process, for tests: queues and descriptors instead of shared memory.

Waits, deadlines, order and the loss of either side are the same. Each end is used by one thread at a time.
Knows nothing of sockets.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tprt.errors import PeerLostError, TransportTimeoutError
from tprt.transport.channel import Buffer, ControlEvent, Reader, Writer


class _Queue:
    """A bounded queue of bytes whose readers can wait on a descriptor; closing either side wakes the other."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[bytes] = deque()
        self._capacity = capacity
        self._changed = threading.Condition()
        self._closed = False
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def put(self, payload: bytes, timeout_s: float, peer: str) -> None:
        with self._changed:
            has_room = self._changed.wait_for(
                lambda: self._closed or len(self._items) < self._capacity, timeout_s
            )
            if self._closed:
                raise PeerLostError(f"{peer} is gone")
            if not has_room:
                raise TransportTimeoutError(f"{peer} has made no room for {timeout_s:g} s")
            self._items.append(payload)
            os.eventfd_write(self.eventfd, 1)

    def take(self) -> bytes | None:
        with self._changed:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.eventfd)
            if not self._items:
                return None
            payload = self._items.popleft()
            if self._items or self._closed:
                os.eventfd_write(self.eventfd, 1)
            self._changed.notify_all()
            return payload

    @property
    def is_over(self) -> bool:
        """Nothing is left and nothing more comes."""
        with self._changed:
            return self._closed and not self._items

    def end(self) -> None:
        with self._changed:
            self._closed = True
            os.eventfd_write(self.eventfd, 1)
            self._changed.notify_all()

    def __del__(self) -> None:
        os.close(self.eventfd)


class InprocWriter:
    """Sends to one queue for each reader."""

    def __init__(self, queues: Sequence[_Queue], peer: str) -> None:
        self._queues = queues
        self._peer = peer

    def send(self, parts: Sequence[Buffer], timeout_s: float) -> None:
        """Send the concatenation of `parts` to every reader."""
        payload = b"".join(parts)
        deadline_s = time.monotonic() + timeout_s
        for reader, queue in enumerate(self._queues):
            queue.put(payload, max(0.0, deadline_s - time.monotonic()), f"{self._peer} {reader}")

    def close(self) -> None:
        """End the lane; readers still get what was sent."""
        for queue in self._queues:
            queue.end()


class InprocReader:
    """Receives from one queue."""

    def __init__(self, queue: _Queue) -> None:
        self._queue = queue

    def receive(self, timeout_s: float) -> bytes:
        """Wait for the next message."""
        deadline_s = time.monotonic() + timeout_s
        while (payload := self.try_receive()) is None:
            if self._queue.is_over:
                raise PeerLostError("the other side is gone")
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(f"no message for {timeout_s:g} s")
            select.select([self._queue.eventfd], [], [], left_s)
        return payload

    def try_receive(self) -> bytes | None:
        """Return the next message if it is there."""
        return self._queue.take()

    def fileno(self) -> int:
        """A descriptor that becomes readable when a message may be there."""
        return self._queue.eventfd

    def close(self) -> None:
        """End the lane; the writer sees it."""
        self._queue.end()


@dataclass(frozen=True, slots=True)
class _Control:
    rank: int
    payload: bytes | None


class InprocWorkerHub:
    """The coordinator's end."""

    def __init__(self, steps: Sequence[_Queue], outputs: _Queue, controls: Sequence[_Queue]) -> None:
        self._steps = InprocWriter(steps, "rank")
        self._outputs = InprocReader(outputs)
        self._controls = controls
        self._lost: set[int] = set()

    @property
    def steps(self) -> Writer:
        """The lane to every rank."""
        return self._steps

    def accept_all(self, timeout_s: float) -> None:
        """Return: links are connected from the start."""

    def receive_output(self, timeout_s: float) -> bytes | ControlEvent:
        """Wait for rank 0's next output; a control event of any rank comes first when there is one."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if (event := self.receive_control(0.0)) is not None:
                return event
            if (output := self._outputs.try_receive()) is not None:
                return output
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(f"rank 0 has not answered within {timeout_s:g} s")
            select.select([*self.filenos(), self._outputs.fileno()], [], [], left_s)

    def receive_control(self, timeout_s: float) -> ControlEvent | None:
        """Return the next control event, or None when there is none in time (0: do not wait)."""
        select.select(self.filenos(), [], [], timeout_s)
        for rank, queue in enumerate(self._controls):
            if rank in self._lost:
                continue
            if (payload := queue.take()) is not None:
                return _Control(rank, payload)
            if queue.is_over:
                self._lost.add(rank)
                return _Control(rank, None)
        return None

    def filenos(self) -> list[int]:
        """Descriptors of the control lanes, for a poller."""
        return [queue.eventfd for rank, queue in enumerate(self._controls) if rank not in self._lost]

    def close(self) -> None:
        """End all lanes; idempotent. Ranks see it as the loss of the coordinator."""
        self._steps.close()
        for queue in self._controls:
            queue.end()


class InprocWorkerLink:
    """One rank's end."""

    def __init__(self, steps: _Queue, outputs: _Queue | None, control: _Queue) -> None:
        self._steps = InprocReader(steps)
        self._outputs = None if outputs is None else InprocWriter([outputs], "coordinator")
        self._control = control

    @property
    def steps(self) -> Reader:
        """Steps from the coordinator."""
        return self._steps

    @property
    def outputs(self) -> Writer | None:
        """Rank 0 only; None elsewhere."""
        return self._outputs

    def send_control(self, payload: Buffer, timeout_s: float) -> None:
        """Send a message on this rank's control lane."""
        self._control.put(bytes(payload), timeout_s, "the coordinator")

    def close(self) -> None:
        """End all lanes; idempotent. The coordinator sees it as the loss of this rank."""
        self._control.end()
        self._steps.close()
        if self._outputs is not None:
            self._outputs.close()


def make_inproc_group(world_size: int, capacity: int = 8) -> tuple[InprocWorkerHub, list[InprocWorkerLink]]:
    """Return a hub and its links; a lane holds `capacity` messages before its writer waits."""
    steps = [_Queue(capacity) for _ in range(world_size)]
    controls = [_Queue(capacity) for _ in range(world_size)]
    outputs = _Queue(capacity)
    links = [
        InprocWorkerLink(steps[rank], outputs if rank == 0 else None, controls[rank])
        for rank in range(world_size)
    ]
    return InprocWorkerHub(steps, outputs, controls), links
