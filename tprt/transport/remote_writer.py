"""Steps to the ranks on other hosts; `tprt.transport.remote_wire` has the protocol.

Every rank acknowledges every message, and a bounded number of them may be unread: who is behind, and by how
much, is known. What ranks say themselves, and their ends, come out as events. Knows nothing of what messages
mean.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError
from tprt.transport.channel import Buffer, ControlEvent
from tprt.transport.remote_door import RemoteDoor
from tprt.transport.remote_rank import RemoteRank
from tprt.transport.remote_wire import FRAME, split_address

# Messages that may be unread: as many as a ring has slots.
_WINDOW = 8
# `close` gives ranks so long to read what was sent: closing over acknowledgements under way would cut it off.
_FLUSH_S = 1.0


class RemoteStepWriter:
    """The one sender of steps to ranks on other hosts; used by one thread."""

    def __init__(self, listener: socket.socket, epoch: int, ranks: Collection[int], token: bytes) -> None:
        """Let ranks in at `listener`, which is the writer's from now on; see `listen` for the rest."""
        self._door = RemoteDoor(listener, epoch, token)
        self._expected = frozenset(ranks)
        self._ranks: dict[int, RemoteRank] = {}
        self._reported: set[int] = set()
        self._sequence = 0
        self._loss = ""
        # Readable while something has been read off a connection that `next_event` has not returned.
        self._unread = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._door, select.EPOLLIN)
        self._epoll.register(self._unread, select.EPOLLIN)

    @classmethod
    def listen(cls, address: str, *, epoch: int, ranks: Collection[int], token: bytes) -> RemoteStepWriter:
        """Listen for ranks.

        Args:
            address: `tcp://host:port`, an interface of this host that the others can reach; port 0: any.
            epoch: number of the worker group; ranks of another one are refused.
            ranks: which ranks are on other hosts.
            token: a secret of this deployment; whoever does not know it is refused.

        Raises:
            TransportError: the address cannot be used.
        """
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=512)
        except OSError as error:
            raise TransportError(
                f"cannot listen on {address}: {error.strerror}; expected an interface of this host and a"
                " free port"
            ) from error
        return cls(listener, epoch, ranks, token)

    @property
    def address(self) -> str:
        """Where ranks connect to, with the port that was chosen."""
        return self._door.address

    def accept_all(self, timeout_s: float) -> None:
        """Wait until every rank has connected.

        Raises:
            TransportTimeoutError: names the ranks that are missing.
            PeerLostError: a rank that had connected is gone.
        """
        deadline_s = time.monotonic() + timeout_s
        while missing := self._missing():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(f"remote ranks {missing} have not connected after {timeout_s:g} s")
            self._take_in(left_s)
            if self._loss:
                raise PeerLostError(self._loss)

    def fileno(self) -> int:
        """A descriptor that is readable when `next_event` has something to do."""
        return self._epoll.fileno()

    def next_event(self) -> ControlEvent | None:
        """Let in who has come and return the next thing that a rank has said, or its end, without waiting."""
        self._take_in(0.0)
        for rank in self._ranks.values():
            if rank.controls:
                return ControlEvent(rank.rank, rank.controls.popleft())
            if rank.is_lost and rank.rank not in self._reported:
                self._reported.add(rank.rank)
                return ControlEvent(rank.rank, None)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._unread)
        return None

    def _take_in(self, timeout_s: float) -> None:
        by_fd = {rank.connection.fileno(): rank for rank in self._ranks.values()}
        for fd, _ in self._epoll.poll(timeout_s):
            if fd == self._door.fileno():
                self._let_in()
            elif fd in by_fd:
                with contextlib.suppress(PeerLostError):
                    self._read(by_fd[fd])

    def send(self, parts: Sequence[Buffer], timeout_s: float) -> None:
        """Send the concatenation of `parts` to every rank; returns when this host's kernel has taken it.

        Raises:
            TransportTimeoutError: ranks did not make room in time; names them. When a message was cut by that,
                the writer cannot be used any more.
            PeerLostError: a rank is gone.
        """
        deadline_s = time.monotonic() + timeout_s
        self.wait_for_room(timeout_s)
        self._sequence = sequence = self._sequence + 1
        payload = b"".join(parts)
        frame = memoryview(FRAME.pack(sequence, len(payload)) + payload)
        for rank in self._ranks.values():
            rank.unsent = frame
        late = self._wait(lambda rank: bool(rank.unsent), select.POLLIN | select.POLLOUT, deadline_s)
        if late:
            self._loss = f"message {sequence} was cut by a deadline: {late}"
            raise TransportTimeoutError(f"message {sequence} was not taken in {timeout_s:g} s: {late}")

    def wait_for_room(self, timeout_s: float) -> None:
        """Wait until every rank has room for one more message.

        Raises:
            TransportTimeoutError, PeerLostError: as `send` does.
        """
        if self._loss:
            raise PeerLostError(self._loss)
        if missing := self._missing():
            raise TransportError(f"remote ranks {missing} have not connected; wait in accept_all first")
        for rank in self._ranks.values():
            self._read(rank)
        sequence = self._sequence + 1
        deadline_s = time.monotonic() + timeout_s
        late = self._wait(lambda rank: rank.num_read < sequence - _WINDOW, select.POLLIN, deadline_s)
        if late:
            raise TransportTimeoutError(f"no room for message {sequence} after {timeout_s:g} s: {late}")

    def describe_behind(self) -> str:
        """Name the ranks that have not read every message and say how far they are; empty if there are none."""
        behind = [rank for rank in self._ranks.values() if rank.num_read < self._sequence]
        return "; ".join(rank.describe(self._sequence) for rank in behind)

    def close(self) -> None:
        """Release everything; idempotent. Ranks see it as the loss of the coordinator.

        Waits up to a second for ranks to read what was sent, unless one is gone.
        """
        if self._epoll.closed:
            return
        if not self._loss:
            with contextlib.suppress(PeerLostError):
                deadline_s = time.monotonic() + _FLUSH_S
                self._wait(lambda rank: rank.num_read < self._sequence, select.POLLIN, deadline_s)
        self._loss = self._loss or "this end of the lane is closed"
        self._epoll.close()
        os.close(self._unread)
        self._door.close()
        for rank in self._ranks.values():
            rank.connection.close()

    def _let_in(self) -> None:
        for rank in self._door.admit(self._missing()):
            self._ranks[rank.rank] = rank
            self._epoll.register(rank.connection, select.EPOLLIN)

    def _missing(self) -> list[int]:
        return sorted(self._expected - self._ranks.keys())

    def _wait(self, is_late: Callable[[RemoteRank], bool], events: int, deadline_s: float) -> str:
        """Wait until no rank is late; return a description of those that are at the deadline."""
        while True:
            for rank in self._ranks.values():
                self._flush(rank)
            late = [rank for rank in self._ranks.values() if is_late(rank)]
            left_s = deadline_s - time.monotonic()
            if not late or left_s <= 0:
                return "; ".join(rank.describe(self._sequence) for rank in late)
            by_fd = {rank.connection.fileno(): rank for rank in self._ranks.values()}
            late_fds = {rank.connection.fileno() for rank in late}
            ready = _poll({fd: events if fd in late_fds else select.POLLIN for fd in by_fd}, left_s)
            for fd in ready:
                self._read(by_fd[fd])

    def _flush(self, rank: RemoteRank) -> None:
        try:
            rank.flush()
        except OSError as error:
            self._lose(rank, error)

    def _read(self, rank: RemoteRank) -> None:
        if rank.is_lost:
            return
        try:
            rank.read()
            if rank.controls:
                os.eventfd_write(self._unread, 1)
        except OSError as error:
            self._lose(rank, error)

    def _lose(self, rank: RemoteRank, error: OSError) -> NoReturn:
        if not rank.is_lost:
            rank.is_lost = True
            os.eventfd_write(self._unread, 1)
            self._epoll.unregister(rank.connection)
        self._loss = self._loss or f"{rank.name} is gone: {error.strerror}; {rank.describe(self._sequence)}"
        raise PeerLostError(self._loss) from error


def _poll(events: dict[int, int], timeout_s: float) -> list[int]:
    poll = select.poll()
    for fd, mask in events.items():
        poll.register(fd, mask)
    return [fd for fd, _ in poll.poll(timeout_s * 1000)]
