"""Where ranks of other hosts come in: a listening TCP socket, and who is let in.

Whoever has connected and not said a whole hello costs a descriptor and nothing else; there are never many of
them. Knows nothing of what a rank is told afterwards.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Collection
from typing import NamedTuple

from tprt.log import get_logger
from tprt.transport.challenge import make_nonce
from tprt.transport.remote_rank import RemoteRank
from tprt.transport.remote_wire import (
    HELLO,
    RemoteHello,
    join_address,
    pack_answer,
    pack_greeting,
    read_hello,
    set_options,
)

_LOG = get_logger(__name__)
# Who came first is turned away when more have come and said nothing.
_MAX_STRANGERS = 256


class _Stranger(NamedTuple):
    """Whoever has connected and not said a whole hello; `nonce` is what it was greeted with."""

    connection: socket.socket
    address: str
    nonce: bytes


class RemoteDoor:
    """Lets in the ranks of one epoch; everyone else is told why not."""

    def __init__(self, listener: socket.socket, epoch: int, token: bytes) -> None:
        """Take a listening socket over; `token` is what a rank must know."""
        listener.setblocking(False)
        self._listener = listener
        self._epoch = epoch
        self._token = token
        self._strangers: dict[int, _Stranger] = {}
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)

    @property
    def address(self) -> str:
        """Where ranks connect to, with the port that was chosen."""
        host, port = self._listener.getsockname()[:2]
        return join_address(host, port)

    def fileno(self) -> int:
        """A descriptor that is readable while `admit` has something to do."""
        return self._epoll.fileno()

    def admit(self, missing: Collection[int]) -> list[RemoteRank]:
        """Take in who has come, without waiting; return those of the ranks `missing` that are let in."""
        admitted: list[RemoteRank] = []
        for fd, _ in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._strangers:
                left = set(missing) - {rank.rank for rank in admitted}
                admitted += self._hear(fd, left)
        return admitted

    def close(self) -> None:
        """Release everything; idempotent."""
        self._epoll.close()
        for stranger in self._strangers.values():
            stranger.connection.close()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, address = self._listener.accept()
            connection.setblocking(False)
            set_options(connection)
            # Not readable before the hello is whole, so that half a hello keeps nobody busy.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, HELLO.size)
            if len(self._strangers) == _MAX_STRANGERS:
                self._forget(next(iter(self._strangers))).connection.close()
            stranger = _Stranger(connection, join_address(*address[:2]), make_nonce())
            self._strangers[connection.fileno()] = stranger
            self._epoll.register(connection, select.EPOLLIN)
            connection.send(pack_greeting(stranger.nonce))

    def _forget(self, fd: int) -> _Stranger:
        self._epoll.unregister(fd)
        return self._strangers.pop(fd)

    def _hear(self, fd: int, missing: Collection[int]) -> list[RemoteRank]:
        """Let in, or refuse, whoever has said hello."""
        stranger = self._forget(fd)
        connection = stranger.connection
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(connection.close)
            try:
                hello = read_hello(connection.recv(HELLO.size))
                reason = self._why_refused(hello, stranger.nonce, missing)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
                connection.send(pack_answer(reason, hello.nonce, self._token))
            except OSError as error:
                reason = str(error.strerror)
            if reason:
                _LOG.warning("refused a connection from %s: %s", stranger.address, reason)
                return []
            cleanup.pop_all()
        return [RemoteRank(hello.rank, connection, stranger.address)]

    def _why_refused(self, hello: RemoteHello, nonce: bytes, missing: Collection[int]) -> str:
        """Return why whoever said `hello` when greeted with `nonce` is not let in; empty if it is."""
        if reason := hello.why_unproven(nonce, self._token):
            return reason
        if hello.epoch != self._epoch:
            return f"it was started for epoch {hello.epoch}; this is epoch {self._epoch}"
        if hello.rank not in missing:
            return f"it calls itself rank {hello.rank}; expected one of {sorted(missing)}"
        return ""
