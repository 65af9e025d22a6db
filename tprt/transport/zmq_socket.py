"""The lane between clients and the coordinator, over ZeroMQ.

Nothing is dropped in silence: a full queue or a client that has gone is an error of the sender. Knows nothing
of what the messages mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from tprt.errors import PeerLostError, TransportError
from tprt.transport.channel import Buffer

_Socket = zmq.Socket[bytes]
_Context = zmq.Context[_Socket]

# Unsent messages of a closed lane are given this long to leave, in milliseconds.
_LINGER_MS = 1000


class RequestServer:
    """The coordinator's end: many clients, each known by an id that ZeroMQ gives it."""

    def __init__(self, context: _Context, socket: _Socket, address: str) -> None:
        self._context = context
        self._socket = socket
        self.address = address

    @classmethod
    def bind(cls, address: str) -> RequestServer:
        """Listen on `address`, such as `ipc:///path` or `tcp://127.0.0.1:*`; `address` has the port chosen.

        Raises:
            TransportError: the address cannot be used.
        """
        context: _Context = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        _set_up(socket)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            context.destroy(linger=0)
            raise TransportError(f"cannot listen on {address}: {error}") from error
        return cls(context, socket, socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """Return the next message with its sender, or None when there is none in time (0: do not wait)."""
        if timeout_s > 0 and not self._socket.poll(int(timeout_s * 1000)):
            return None
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return frames[0], frames[1] if len(frames) == 2 else b""

    def send(self, client_id: bytes, parts: Sequence[Buffer]) -> None:
        """Send the concatenation of `parts` to one client.

        Raises:
            PeerLostError: that client is gone.
        """
        try:
            self._socket.send_multipart([client_id, b"".join(parts)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise PeerLostError(f"client {client_id.hex()} is gone: {error}") from error

    def fileno(self) -> int:
        """A descriptor that becomes readable when something comes after `receive` has returned None.

        It signals edges, not levels (ZeroMQ, "ZMQ_FD"): wait on it only after an empty `receive`.
        """
        descriptor: int = self._socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        return descriptor

    def close(self) -> None:
        """Release everything; idempotent."""
        self._context.destroy(linger=_LINGER_MS)


class RequestClient:
    """A client's end."""

    def __init__(self, context: _Context, socket: _Socket) -> None:
        self._context = context
        self._socket = socket

    @classmethod
    def connect(cls, address: str) -> RequestClient:
        """Connect to a `RequestServer`, which may come later: messages wait for it."""
        context: _Context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        _set_up(socket)
        socket.connect(address)
        return cls(context, socket)

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send the concatenation of `parts` as one message."""
        self._socket.send(b"".join(parts))

    def receive(self, timeout_s: float) -> bytes | None:
        """Return the next message, or None when there is none in time (0: do not wait)."""
        if timeout_s > 0 and not self._socket.poll(int(timeout_s * 1000)):
            return None
        try:
            return self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def close(self) -> None:
        """Release everything; idempotent."""
        self._context.destroy(linger=_LINGER_MS)


def _set_up(socket: _Socket) -> None:
    """Queue without bound: requests are small, and a bound would drop or block instead."""
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
