"""The door of a hub: the socket where ranks come in, and who is let in.

Knows nothing of what a rank gets.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket

from tprt.errors import TransportError
from tprt.log import get_logger
from tprt.transport.handshake import WorkerHello, check_path, read_hello, refuse

_LOG = get_logger(__name__)
# Ranks of one group connect at about the same time.
_BACKLOG = 512


class WorkerListener:
    """Listens for the ranks of one epoch; everyone else is told why not."""

    def __init__(self, path: str, epoch: int, world_size: int) -> None:
        """Listen at `path`, over what a dead process has left there.

        Raises:
            TransportError: the path cannot be used.
        """
        check_path(path)
        self._path = path
        self._epoch = epoch
        self._world_size = world_size
        self._admitted: set[int] = set()
        self._waiting: dict[int, socket.socket] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        try:
            _bind(self._socket, path)
        except OSError as error:
            self._socket.close()
            raise TransportError(
                f"cannot listen at {path}: {error.strerror}; expected a folder that exists and no other"
                " hub there"
            ) from error
        self._socket.listen(_BACKLOG)
        self._epoll = select.epoll()
        self._epoll.register(self._socket, select.EPOLLIN)

    def fileno(self) -> int:
        """A descriptor that is readable while `admit` has something to do."""
        return self._epoll.fileno()

    @property
    def missing(self) -> list[int]:
        """Ranks that have not been admitted."""
        return sorted(set(range(self._world_size)) - self._admitted)

    def admit(self) -> list[tuple[WorkerHello, socket.socket]]:
        """Take in who has come, without waiting; return the ranks that may have their lanes.

        The connections are the caller's from now on.
        """
        admitted = []
        for fd, _ in self._epoll.poll(0):
            if fd == self._socket.fileno():
                self._accept()
                continue
            connection = self._waiting.pop(fd)
            self._epoll.unregister(fd)
            hello = self._check(connection)
            if hello is not None:
                self._admitted.add(hello.rank)
                admitted.append((hello, connection))
        return admitted

    def close(self) -> None:
        """Release everything and remove the socket; idempotent."""
        if self._epoll.closed:
            return
        self._epoll.close()
        for connection in (self._socket, *self._waiting.values()):
            connection.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        self._waiting[connection.fileno()] = connection
        self._epoll.register(connection, select.EPOLLIN)

    def _check(self, connection: socket.socket) -> WorkerHello | None:
        """Return who it is, or refuse it."""
        try:
            hello = read_hello(connection)
            self._raise_if_unexpected(hello)
        except TransportError as error:
            _LOG.warning("refused a connection to %s: %s", self._path, error)
            refuse(connection, str(error))
        except OSError as error:
            _LOG.warning("a connection to %s was lost: %s", self._path, error.strerror)
            connection.close()
        else:
            return hello
        return None

    def _raise_if_unexpected(self, hello: WorkerHello) -> None:
        if hello.epoch != self._epoch:
            raise TransportError(f"it was started for epoch {hello.epoch}; this is epoch {self._epoch}")
        if not 0 <= hello.rank < self._world_size:
            raise TransportError(f"it calls itself rank {hello.rank}; expected 0 to {self._world_size - 1}")
        if hello.rank in self._admitted:
            raise TransportError(
                f"rank {hello.rank} has connected before; give every process a rank of its own"
            )


def _bind(listener: socket.socket, path: str) -> None:
    """Bind `listener` to `path`; a socket there that nobody listens on is replaced."""
    try:
        listener.bind(path)
    except OSError:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except OSError:
                pass
        listener.bind(path)
