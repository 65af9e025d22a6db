"""The lane between clients and the coordinator, over ZeroMQ: many `RequestClient`s, one `RequestServer`.

Nothing is dropped in silence. A message for a client that is gone is an error of that one `send`; a client that
does not read is given up once `max_unread` messages wait for it, and is told so when it reads again; a client
sees the end of the server at once. Knows nothing of what the messages mean.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Sequence

import zmq
from zmq.utils.monitor import parse_monitor_message

from tprt.errors import PeerLostError, TransportError
from tprt.log import get_logger
from tprt.transport.channel import Buffer

_LOG = get_logger(__name__)
_Socket = zmq.Socket[bytes]
_Context = zmq.Context[_Socket]

# What is sent before `close` has this long to leave; after it ZeroMQ's own LINGER is 0.
_FLUSH_MS = 1000
# Between two attempts to reach a server that is not there yet.
_RETRY_MS = 10
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_MAX_UNREAD = 10_000
# A host that vanishes closes nothing: over TCP ZeroMQ asks for a sign of life. A unix socket needs none.
_HEARTBEAT_MS = 5_000
_HEARTBEAT_TIMEOUT_MS = 30_000


class RequestServer:
    """The coordinator's end: many clients, each known by an id that ZeroMQ gives to its connection."""

    def __init__(self, context: _Context, socket: _Socket, address: str) -> None:
        self._context = context
        self._socket = socket
        self._given_up: set[bytes] = set()
        self._untold: set[bytes] = set()
        self.address = address

    @classmethod
    def bind(cls, address: str, *, max_unread: int = _MAX_UNREAD) -> RequestServer:
        """Listen on `address`, such as `ipc:///path` or `tcp://127.0.0.1:*`; `.address` has the port chosen.

        Args:
            address: where clients connect to.
            max_unread: messages that may wait for a client before it is given up.

        Raises:
            TransportError: the address cannot be used.
        """
        context: _Context = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        _set_options(socket, address)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, max_unread)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            context.destroy(linger=0)
            raise TransportError(
                f"cannot listen on {address}: {error}; expected ipc:// with a path of at most 107 characters"
                " in a folder that exists, or tcp:// with an interface and a free port"
            ) from error
        return cls(context, socket, socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """Return the next message with its sender, or None when there is none in time (0: do not wait)."""
        deadline_s = time.monotonic() + timeout_s
        while (received := self._try_receive()) is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            self._socket.poll(_to_ms(left_s))
        return received

    def send(self, client_id: bytes, parts: Sequence[Buffer]) -> None:
        """Send the concatenation of `parts` to one client; never waits.

        Raises:
            PeerLostError: that client is gone, or is so far behind that it has been given up. Nothing was sent,
                and nothing will be to this id.
        """
        if client_id in self._given_up:
            raise PeerLostError(f"client {client_id.hex()} has been given up: it does not read")
        try:
            self._socket.send_multipart([client_id, b"".join(parts)], zmq.NOBLOCK)
        except zmq.Again as error:
            self._given_up.add(client_id)
            self._untold.add(client_id)
            unread = self._socket.getsockopt(zmq.SNDHWM)
            raise PeerLostError(
                f"client {client_id.hex()} is given up: it has not read the last {unread!r} messages"
            ) from error
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise PeerLostError(f"client {client_id.hex()} is gone: its connection is closed") from error

    def fileno(self) -> int:
        """A descriptor for a poller; becomes readable when something comes after `receive` has returned None.

        It signals edges, not levels (ZeroMQ manual, ZMQ_FD), and `send` may take an edge away: between the
        last empty `receive(0)` and the wait nothing may be sent. `receive` until None after every wake-up.
        """
        descriptor: int = self._socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        return descriptor

    def close(self) -> None:
        """Release everything; idempotent. Waits up to a second for what was sent to leave."""
        self._context.destroy(linger=_FLUSH_MS)
        remove_socket_file(self.address)

    def _try_receive(self) -> tuple[bytes, bytes] | None:
        if self._untold:
            self._tell_given_up()
        while True:
            try:
                client_id, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if client_id in self._given_up:
                continue
            if len(frames) == 1:
                return client_id, frames[0]
            _LOG.warning("ignored a message of %d frames from client %s", len(frames), client_id.hex())

    def _tell_given_up(self) -> None:
        """Tell clients that were given up, as soon as they have read enough to make room for it."""
        for client_id in list(self._untold):
            try:
                self._socket.send_multipart([client_id, b"", b"it did not read for too long"], zmq.NOBLOCK)
            except zmq.Again:
                continue
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
            self._untold.remove(client_id)


class RequestClient:
    """A client's end.

    Attributes:
        loss: why nothing will come or go any more, or None while the lane is whole. What had arrived before
            can still be received.
    """

    def __init__(self, context: _Context, socket: _Socket, address: str) -> None:
        self.loss: str | None = None
        self._context = context
        self._socket = socket
        self._address = address
        self._arrived: deque[list[bytes]] = deque()
        self._monitor: _Socket = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    @classmethod
    def connect(cls, address: str) -> RequestClient:
        """Connect to a `RequestServer`, which may come later: messages wait for it.

        Raises:
            TransportError: this is no address.
        """
        context: _Context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        _set_options(socket, address)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, _RETRY_MS)
        client = cls(context, socket, address)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            client.close()
            raise TransportError(
                f"cannot connect to {address}: {error}; expected ipc:// with a path, or tcp:// with host"
                " and port"
            ) from error
        return client

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send the concatenation of `parts` as one message; never waits. After a `loss` there is nobody to."""
        if self.loss is None:
            self._socket.send(b"".join(parts))

    def receive(self, timeout_s: float) -> bytes | None:
        """Return the next message, or None when there is none in time (0: do not wait).

        The end of the server cuts the wait short; `loss` then says so.
        """
        deadline_s = time.monotonic() + timeout_s
        was_lost = self.loss is not None
        while True:
            message = self._try_receive()
            left_s = deadline_s - time.monotonic()
            if message is not None:
                return message
            if left_s <= 0:
                return self._try_receive() if self._notice_events() else None
            if self.loss is not None:
                # The lane stays silent from now on: a caller that loops must not spin.
                time.sleep(left_s if was_lost else 0.0)
                return None
            if self._monitor in dict(self._poller.poll(_to_ms(left_s))):
                self._read_monitor()

    def filenos(self) -> tuple[int, ...]:
        """Descriptors for a poller; one is readable when something comes after `receive` has returned None.

        They signal edges, as that of `RequestServer.fileno` does, and `send` may take one away: after every
        wake-up and every `send`, `receive(0)` until None. After a `loss` they say nothing.
        """
        return tuple(int(socket.getsockopt(zmq.FD)) for socket in (self._socket, self._monitor))

    def close(self, flush: bool = True) -> None:
        """Release everything; idempotent.

        With `flush` it waits up to a second for what was sent to leave; without, that is dropped.
        """
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
        self._context.destroy(linger=_FLUSH_MS if flush else 0)

    def _try_receive(self) -> bytes | None:
        if self._arrived:
            return self._take(self._arrived.popleft())
        if self.loss is not None:
            return None
        try:
            return self._take(self._socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def _notice_events(self) -> bool:
        """Look, without waiting, whether the server has gone; True when it was seen just now."""
        if self.loss is not None or not int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return False
        self._read_monitor()
        return self.loss is not None

    def _take(self, frames: list[bytes]) -> bytes | None:
        if len(frames) == 1:
            return frames[0]
        self.loss = f"the server at {self._address} has given this client up: {frames[-1].decode()}"
        return None

    def _read_monitor(self) -> None:
        """Take note that the server is gone; keep what it had sent, and do not look for another server."""
        event = parse_monitor_message(self._monitor.recv_multipart())
        if event["event"] != zmq.EVENT_DISCONNECTED:
            return
        while True:
            try:
                self._arrived.append(self._socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                break
        self.loss = f"the server at {self._address} has closed the connection"
        # What waits to be sent goes with it: a disconnected endpoint keeps the linger of this moment, and with
        # ZeroMQ's endless default it would hold up `close` for ever.
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.disconnect(self._address)


def remove_socket_file(address: str) -> None:
    """Remove what ZeroMQ leaves of an address that was listened on; nothing for TCP."""
    if address.startswith("ipc://"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address.removeprefix("ipc://"))


def _to_ms(duration_s: float) -> int:
    return math.ceil(duration_s * 1000)


def _set_options(socket: _Socket, address: str) -> None:
    if address.startswith("tcp://"):
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
