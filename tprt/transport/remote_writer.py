"""Steps to the ranks on other hosts; `tprt.transport.remote_wire` has the protocol.

Every rank acknowledges every message, and a bounded number of them may be unread: who is behind, and by how
much, is known. Knows nothing of what messages mean.
"""

from __future__ import annotations

import contextlib
import hmac
import select
import socket
import time
from collections.abc import Callable, Collection, Sequence

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError
from tprt.log import get_logger
from tprt.transport.channel import Buffer
from tprt.transport.remote_wire import (
    ACK,
    FRAME,
    HELLO,
    MAGIC,
    VERSION,
    join_address,
    pack_answer,
    pack_hello,
    set_options,
    split_address,
)

_LOG = get_logger(__name__)

# Messages that may be unread: as many as a ring has slots.
_WINDOW = 8
# `close` gives ranks so long to read what was sent: closing over acknowledgements under way would cut it off.
_FLUSH_S = 1.0


class _Rank:
    """One rank's connection, with what it has not taken and not acknowledged yet."""

    def __init__(self, rank: int, connection: socket.socket, address: str) -> None:
        self.name = f"rank {rank} at {address}"
        self.connection = connection
        self.unsent = memoryview(b"")
        self.num_read = 0
        self._arrived = b""
        self._heard_s = time.monotonic()

    def flush(self) -> None:
        """Give the kernel what it takes of `unsent`."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                self.unsent = self.unsent[self.connection.send(self.unsent) :]

    def take_acknowledgements(self) -> None:
        """Update `num_read`.

        Raises:
            ConnectionError: the rank has closed the connection.
        """
        with contextlib.suppress(BlockingIOError):
            while True:
                arrived = self.connection.recv(4096)
                if not arrived:
                    raise ConnectionResetError(0, "its end of the connection is closed")
                self._arrived += arrived
                self._heard_s = time.monotonic()
                if whole := len(self._arrived) // ACK.size * ACK.size:
                    (self.num_read,) = ACK.unpack(self._arrived[whole - ACK.size : whole])
                    self._arrived = self._arrived[whole:]

    def describe(self, num_sent: int) -> str:
        """Say how far the rank is."""
        age_s = time.monotonic() - self._heard_s
        return (
            f"{self.name} has read up to message {self.num_read} of {num_sent}, last heard of {age_s:.1f} s ago"
        )


class RemoteStepWriter:
    """The one sender of steps to ranks on other hosts; used by one thread."""

    def __init__(self, listener: socket.socket, epoch: int, ranks: Collection[int], token: bytes) -> None:
        self._listener = listener
        self._epoch = epoch
        self._expected = frozenset(ranks)
        self._token = token
        self._ranks: dict[int, _Rank] = {}
        self._waiting: dict[int, socket.socket] = {}
        self._sequence = 0
        self._loss = ""

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
        listener.setblocking(False)
        return cls(listener, epoch, ranks, token)

    @property
    def address(self) -> str:
        """Where ranks connect to, with the port that was chosen."""
        host, port = self._listener.getsockname()[:2]
        return join_address(host, port)

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
            sockets = [self._listener, *self._waiting.values()]
            connected = {rank.connection.fileno(): rank for rank in self._ranks.values()}
            for fd in _poll(dict.fromkeys([*(s.fileno() for s in sockets), *connected], select.POLLIN), left_s):
                if fd in connected:
                    self._take_acknowledgements(connected[fd])
                elif fd == self._listener.fileno():
                    self._accept()
                else:
                    self._admit(self._waiting[fd])

    def send(self, parts: Sequence[Buffer], timeout_s: float) -> None:
        """Send the concatenation of `parts` to every rank; returns when this host's kernel has taken it.

        Raises:
            TransportTimeoutError: ranks did not make room in time; names them. When a message was cut by that,
                the writer cannot be used any more.
            PeerLostError: a rank is gone.
        """
        if self._loss:
            raise PeerLostError(self._loss)
        if missing := self._missing():
            raise TransportError(
                f"remote ranks {missing} have not connected; wait in accept_all before sending"
            )
        deadline_s = time.monotonic() + timeout_s
        sequence, ranks = self._sequence + 1, self._ranks.values()
        for rank in ranks:
            self._take_acknowledgements(rank)
        needed = sequence - _WINDOW
        late = self._wait(lambda rank: rank.num_read < needed, select.POLLIN, deadline_s)
        if late:
            raise TransportTimeoutError(f"no room for message {sequence} after {timeout_s:g} s: {late}")
        self._sequence = sequence
        payload = b"".join(parts)
        frame = memoryview(FRAME.pack(sequence, len(payload)) + payload)
        for rank in ranks:
            rank.unsent = frame
        late = self._wait(lambda rank: bool(rank.unsent), select.POLLIN | select.POLLOUT, deadline_s)
        if late:
            self._loss = f"message {sequence} was cut by a deadline: {late}"
            raise TransportTimeoutError(f"message {sequence} was not taken in {timeout_s:g} s: {late}")

    def close(self) -> None:
        """Release everything; idempotent. Ranks see it as the loss of the coordinator.

        Waits up to a second for ranks to read what was sent, unless one is gone.
        """
        if not self._loss:
            with contextlib.suppress(PeerLostError):
                deadline_s = time.monotonic() + _FLUSH_S
                self._wait(lambda rank: rank.num_read < self._sequence, select.POLLIN, deadline_s)
        self._loss = self._loss or "this end of the lane is closed"
        connections = [rank.connection for rank in self._ranks.values()]
        for connection in (self._listener, *self._waiting.values(), *connections):
            connection.close()

    def _missing(self) -> list[int]:
        return sorted(self._expected - self._ranks.keys())

    def _wait(self, is_late: Callable[[_Rank], bool], events: int, deadline_s: float) -> str:
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
                self._take_acknowledgements(by_fd[fd])

    def _flush(self, rank: _Rank) -> None:
        try:
            rank.flush()
        except OSError as error:
            self._lose(rank, error)

    def _take_acknowledgements(self, rank: _Rank) -> None:
        try:
            rank.take_acknowledgements()
        except OSError as error:
            self._lose(rank, error)

    def _lose(self, rank: _Rank, error: OSError) -> None:
        self._loss = f"{rank.name} is gone: {error.strerror}; {rank.describe(self._sequence)}"
        raise PeerLostError(self._loss) from error

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            set_options(connection)
            # Not readable before the hello is whole, so that half a hello keeps nobody busy.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, HELLO.size)
            self._waiting[connection.fileno()] = connection

    def _admit(self, connection: socket.socket) -> None:
        """Let in, or refuse, whoever has said hello."""
        del self._waiting[connection.fileno()]
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(connection.close)
            address = "a host that is gone"
            try:
                address = join_address(*connection.getpeername()[:2])
                reason, rank = self._check(connection.recv(HELLO.size))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
                connection.send(pack_answer(reason))
            except OSError as error:
                reason = str(error.strerror)
            if reason:
                _LOG.warning("refused a connection from %s: %s", address, reason)
                return
            cleanup.pop_all()
        self._ranks[rank] = _Rank(rank, connection, address)

    def _check(self, hello: bytes) -> tuple[str, int]:
        """Return why whoever said this hello is not let in, empty if it is, and its rank."""
        magic, version, epoch, rank, _ = HELLO.unpack(hello.ljust(HELLO.size, b"\0"))
        if (magic, version) != (MAGIC, VERSION):
            return f"it began with {hello[:12]!r}; expected a tprt rank that speaks version {VERSION}", rank
        if not hmac.compare_digest(hello, pack_hello(epoch, rank, self._token)):
            return "it does not know the token of this deployment", rank
        if epoch != self._epoch:
            return f"it was started for epoch {epoch}; this is epoch {self._epoch}", rank
        if rank not in self._missing():
            return f"it calls itself rank {rank}; expected one of {self._missing()}", rank
        return "", rank


def _poll(events: dict[int, int], timeout_s: float) -> list[int]:
    poll = select.poll()
    for fd, mask in events.items():
        poll.register(fd, mask)
    return [fd for fd, _ in poll.poll(timeout_s * 1000)]
