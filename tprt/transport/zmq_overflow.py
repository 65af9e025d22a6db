"""The lane for messages that outgrow a slot of the ring: ZeroMQ, one pipe for each reader.

The ring's marker says which message comes here and how long it is. Knows nothing of the ring.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import zmq

from tprt.errors import SequenceGapError, TransportTimeoutError

_Socket = zmq.Socket[bytes]
_SEQUENCE_BYTES = 8


class OverflowSender:
    """The writer's end: listens on one address for each reader."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._context: zmq.Context[_Socket] = zmq.Context()
        self._sockets = [self._context.socket(zmq.PUSH) for _ in addresses]
        for socket, address in zip(self._sockets, addresses, strict=True):
            socket.setsockopt(zmq.SNDHWM, 1)
            socket.bind(address)

    def send(self, sequence: int, payload: bytes, timeout_s: float) -> None:
        """Send message number `sequence` to every reader.

        Raises:
            TransportTimeoutError: a reader did not take it in time.
        """
        deadline_s = time.monotonic() + timeout_s
        for reader, socket in enumerate(self._sockets):
            left_ms = max(0, int((deadline_s - time.monotonic()) * 1000))
            if not socket.poll(left_ms, zmq.POLLOUT):
                raise TransportTimeoutError(
                    f"reader {reader} took no message {sequence} of {len(payload)} bytes in {timeout_s:g} s"
                )
            socket.send_multipart([sequence.to_bytes(_SEQUENCE_BYTES, "little"), payload])

    def close(self) -> None:
        """Release everything; idempotent."""
        self._context.destroy(linger=0)


class OverflowReceiver:
    """One reader's end."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[_Socket] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 1)
        self._socket.connect(address)

    def receive(self, sequence: int, timeout_s: float) -> bytes:
        """Return message number `sequence`.

        Raises:
            TransportTimeoutError: it did not come in time.
            SequenceGapError: another one came.
        """
        if not self._socket.poll(int(timeout_s * 1000)):
            raise TransportTimeoutError(f"message {sequence} did not come within {timeout_s:g} s of its marker")
        number, payload = self._socket.recv_multipart()
        found = int.from_bytes(number, "little")
        if found != sequence:
            raise SequenceGapError(f"large message {found} came; expected {sequence}")
        return payload

    def close(self) -> None:
        """Release everything; idempotent."""
        self._context.destroy(linger=0)
