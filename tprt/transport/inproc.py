"""The twin of hub and links inside one process, for tests: queues under one lock instead of shared memory.

Order, back-pressure, deadlines and the loss of either side are those of the real thing. Ends may be used by
threads of their own or all by one thread. Knows nothing of sockets and shared memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence

from tprt.errors import PeerLostError, TransportTimeoutError
from tprt.transport.channel import Buffer, ControlEvent, Reader, WorkerHub, WorkerLink, Writer

# Of the order of what a socket's buffer holds.
_CONTROL_CAPACITY = 256


class _Bell:
    """A descriptor that is readable after `ring` until `hush`; used under the group's lock."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ring(self) -> None:
        if self.fd >= 0:
            os.eventfd_write(self.fd, 1)

    def hush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __del__(self) -> None:
        # A test may make links that it never uses, and so never closes.
        self.close()


class _Lane:
    """One writer, N readers. Everything in it is used under `changed`, the lock of the whole group."""

    def __init__(
        self, changed: threading.Condition, writer: str, readers: Sequence[str], capacity: int
    ) -> None:
        self.changed = changed
        self.writer = writer
        self.readers = readers
        self.capacity = capacity
        self.num_sent = 0
        self.writer_is_gone = False
        self.gone_readers: set[int] = set()
        self.unread: list[deque[bytes]] = [deque() for _ in readers]
        self.bells = [_Bell() for _ in readers]

    def behind(self, num_unread: int) -> str:
        """Say which readers have at least so many unread messages."""
        return "; ".join(
            f"{name} has read up to message {self.num_sent - len(unread)} of {self.num_sent}"
            for name, unread in zip(self.readers, self.unread, strict=True)
            if len(unread) >= num_unread
        )

    def wake_readers(self) -> None:
        for bell in self.bells:
            bell.ring()
        self.changed.notify_all()


class InprocWriter:
    """The one sender of a lane."""

    def __init__(self, lane: _Lane) -> None:
        self._lane = lane

    def send(self, parts: Sequence[Buffer], timeout_s: float) -> None:
        """Send the concatenation of `parts`; nothing is sent when this raises.

        Raises:
            TransportTimeoutError: readers did not make room in time; names them.
            PeerLostError: a reader is gone.
        """
        lane, message = self._lane, b"".join(parts)
        with lane.changed:
            has_room = lane.changed.wait_for(
                lambda: lane.gone_readers or all(len(unread) < lane.capacity for unread in lane.unread),
                timeout_s,
            )
            if lane.gone_readers:
                raise PeerLostError(f"{lane.readers[min(lane.gone_readers)]} is gone")
            if not has_room:
                raise TransportTimeoutError(
                    f"no room for message {lane.num_sent + 1} after {timeout_s:g} s, in a lane of"
                    f" {lane.capacity}: {lane.behind(lane.capacity)}"
                )
            lane.num_sent += 1
            for unread in lane.unread:
                unread.append(message)
            lane.wake_readers()

    def close(self) -> None:
        """End the lane; readers still get what was sent."""
        with self._lane.changed:
            self._lane.writer_is_gone = True
            self._lane.wake_readers()


class InprocReader:
    """One receiving end of a lane."""

    def __init__(self, lane: _Lane, reader: int) -> None:
        self._lane = lane
        self._reader = reader
        self._unread = lane.unread[reader]

    def receive(self, timeout_s: float) -> bytes:
        """Wait for the next message and return it.

        Raises:
            TransportTimeoutError: nothing came in time.
            PeerLostError: the writer is gone and nothing is left to read.
        """
        lane = self._lane
        with lane.changed:
            lane.changed.wait_for(lambda: self._unread or lane.writer_is_gone, timeout_s)
            message = self.try_receive()
            if message is None and lane.writer_is_gone:
                raise PeerLostError(f"{lane.writer} is gone; the last message read was {lane.num_sent}")
            if message is None:
                raise TransportTimeoutError(
                    f"{lane.writer} has sent nothing for {timeout_s:g} s; waiting for message"
                    f" {lane.num_sent + 1}"
                )
            return message

    def try_receive(self) -> bytes | None:
        """Return the next message if it is there."""
        with self._lane.changed:
            if not self._unread:
                self._lane.bells[self._reader].hush()
                return None
            self._lane.changed.notify_all()
            return self._unread.popleft()

    def fileno(self) -> int:
        """A descriptor that becomes readable when a message may be there; `try_receive` decides."""
        return self._lane.bells[self._reader].fd

    def close(self) -> None:
        """Leave the lane: the writer sees it; idempotent."""
        with self._lane.changed:
            self._lane.gone_readers.add(self._reader)
            self._lane.bells[self._reader].close()
            self._lane.changed.notify_all()


class InprocWorkerHub:
    """The coordinator's end."""

    def __init__(self, steps: _Lane, outputs: _Lane, controls: Sequence[_Lane]) -> None:
        self._changed = steps.changed
        self._steps_lane = steps
        self._steps = InprocWriter(steps)
        self._outputs = InprocReader(outputs, 0)
        self._controls = list(enumerate(controls))
        self._control_readers = [InprocReader(lane, 0) for lane in controls]

    @property
    def steps(self) -> Writer:
        """The lane to every rank."""
        return self._steps

    def accept_all(self, timeout_s: float) -> None:
        """Return at once: links are connected from the start."""

    def receive_output(self, timeout_s: float) -> bytes | ControlEvent:
        """Wait for rank 0's next output, or a control event of any rank when no output is there.

        Raises:
            TransportTimeoutError: neither came in time; names the ranks that have not read all steps.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if (output := self._outputs.try_receive()) is not None:
                    return output
                if (event := self._next_event()) is not None:
                    return event
                if not self._changed.wait(max(0.0, deadline_s - time.monotonic())):
                    behind = self._steps_lane.behind(1) or "all ranks have read every step"
                    raise TransportTimeoutError(f"rank 0 has not answered within {timeout_s:g} s; {behind}")

    def receive_control(self, timeout_s: float) -> ControlEvent | None:
        """Return the next control event, or None when there is none in time (0: do not wait)."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while (event := self._next_event()) is None:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)
            return event

    def filenos(self) -> list[int]:
        """Descriptors for a poller; one becomes readable when `receive_control` has something to do."""
        return [reader.fileno() for reader in self._control_readers]

    def close(self) -> None:
        """Release everything; idempotent. Ranks see it as the loss of the coordinator."""
        self._steps.close()
        for reader in (self._outputs, *self._control_readers):
            reader.close()

    def _next_event(self) -> ControlEvent | None:
        for rank, lane in self._controls:
            payload = self._control_readers[rank].try_receive()
            if payload is None and lane.writer_is_gone:
                # The loss is told once; the rank's descriptor stays silent from now on.
                self._controls.remove((rank, lane))
                return ControlEvent(rank, None)
            if payload is not None:
                return ControlEvent(rank, payload)
        return None


class InprocWorkerLink:
    """One rank's end."""

    def __init__(self, rank: int, steps: _Lane, outputs: _Lane, control: _Lane) -> None:
        self._steps = InprocReader(steps, rank)
        self._outputs = InprocWriter(outputs) if rank == 0 else None
        self._control = InprocWriter(control)

    @property
    def steps(self) -> Reader:
        """Steps from the coordinator."""
        return self._steps

    @property
    def outputs(self) -> Writer | None:
        """Rank 0 only; None elsewhere."""
        return self._outputs

    def send_control(self, payload: Buffer, timeout_s: float) -> None:
        """Send a message on this rank's control lane; any thread may.

        Raises:
            TransportTimeoutError: the coordinator does not read.
            PeerLostError: it is gone.
        """
        self._control.send([payload], timeout_s)

    def close(self) -> None:
        """Release everything; idempotent. The coordinator sees it as the loss of this rank."""
        self._steps.close()
        for writer in (self._outputs, self._control):
            if writer is not None:
                writer.close()


def make_inproc_group(world_size: int, capacity: int = 8) -> tuple[WorkerHub, list[WorkerLink]]:
    """Return a hub and its links, connected; a lane holds `capacity` messages before its writer waits."""
    # Reentrant, so that a reader may be asked while the group is locked.
    changed = threading.Condition(threading.RLock())
    names = [f"rank {rank}" for rank in range(world_size)]
    steps = _Lane(changed, "the coordinator", names, capacity)
    outputs = _Lane(changed, "rank 0", ["the coordinator"], capacity)
    controls = [_Lane(changed, name, ["the coordinator"], _CONTROL_CAPACITY) for name in names]
    hub = InprocWorkerHub(steps, outputs, controls)
    return hub, [InprocWorkerLink(rank, steps, outputs, controls[rank]) for rank in range(world_size)]
