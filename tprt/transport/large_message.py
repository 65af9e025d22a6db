"""The lane for messages that outgrow a slot of a ring: ZeroMQ PUSH to PULL over ipc, one pipe for each reader.

The ring carries a marker for each of them, which gives the order and bounds how many are under way, so the
pipes need no bound of their own and sending never waits. Sockets, and with them ZeroMQ's threads, come with the
first large message. Knows nothing of the ring's memory.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Sequence

import zmq

from tprt.errors import SequenceGapError, TransportTimeoutError
from tprt.transport.channel import Buffer
from tprt.transport.zmq_socket import remove_socket_file

_Socket = zmq.Socket[bytes]
_Context = zmq.Context[_Socket]

_HEADER = struct.Struct("<QQ")
# Between two attempts to reach a reader that has not met its first marker yet.
_RETRY_MS = 5
# What is under way when the writer closes has this long to leave.
_FLUSH_MS = 500
# Between two looks at whether the writer lives.
_LOOK_MS = 50


class LargeMessageSender:
    """The writer's end; `addresses` are where its readers listen, in their order."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._context: _Context | None = None
        self._sockets: list[_Socket] = []

    def send(self, sequence: int, parts: Sequence[Buffer]) -> None:
        """Send the concatenation of `parts` as message `sequence` to every reader; does not wait."""
        if self._context is None:
            self._context = zmq.Context()
            self._sockets = [self._connect(self._context, address) for address in self._addresses]
        payload = b"".join(parts)
        for socket in self._sockets:
            socket.send_multipart([_HEADER.pack(sequence, len(payload)), payload], zmq.NOBLOCK)

    @staticmethod
    def _connect(context: _Context, address: str) -> _Socket:
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, _RETRY_MS)
        socket.connect(address)
        return socket

    def close(self) -> None:
        """Release everything; idempotent."""
        if self._context is not None:
            self._context.destroy(linger=_FLUSH_MS)


class LargeMessageReceiver:
    """One reader's end; it listens at `address`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._context: _Context | None = None
        self._socket: _Socket

    def receive(self, sequence: int, size: int, deadline_s: float, check_writer: Callable[[], None]) -> bytes:
        """Wait for the message that a marker has announced.

        Args:
            sequence: its number.
            size: its bytes.
            deadline_s: end of the wait, on the monotonic clock.
            check_writer: called now and then while waiting; raises when the writer is gone.

        Raises:
            TransportTimeoutError: it did not come in time; the call may be repeated.
            SequenceGapError: what came is not what the marker announced.
        """
        if self._context is None:
            self._context = zmq.Context()
            self._socket = self._context.socket(zmq.PULL)
            self._socket.setsockopt(zmq.RCVHWM, 0)
            self._socket.bind(self._address)
        self._wait(sequence, size, deadline_s, check_writer)
        header, payload = self._socket.recv_multipart()
        found = _HEADER.unpack(header)
        if found != (sequence, size) or len(payload) != size:
            raise SequenceGapError(
                f"large message {found[0]} of {len(payload)} bytes came; its marker says message {sequence} of"
                f" {size} bytes"
            )
        return payload

    def _wait(self, sequence: int, size: int, deadline_s: float, check_writer: Callable[[], None]) -> None:
        left_ms = _LOOK_MS
        while not self._socket.poll(min(left_ms, _LOOK_MS)):
            left_ms = math.ceil((deadline_s - time.monotonic()) * 1000)
            if left_ms <= 0:
                raise TransportTimeoutError(f"message {sequence} of {size} bytes is late behind its marker")
            check_writer()

    def close(self) -> None:
        """Release everything; idempotent."""
        if self._context is not None:
            self._context.destroy(linger=0)
            remove_socket_file(self._address)
