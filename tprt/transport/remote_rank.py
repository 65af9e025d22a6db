"""The writer's end of one connection to a rank on another host; see `tprt.transport.remote_wire`.

Knows nothing of other ranks and never waits.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque

from tprt.transport.control_lane import MAX_CONTROL_BYTES
from tprt.transport.remote_wire import UP

_RECEIVE_BYTES = 64 * 1024


class RemoteRank:
    """One rank's connection, with what it has not taken and not acknowledged yet.

    Attributes:
        unsent: what the kernel has not taken so far.
        num_read: messages that the rank has read.
        controls: control messages that have come and nobody has looked at.
        is_lost: whether the connection has ended.
    """

    def __init__(self, rank: int, connection: socket.socket, address: str) -> None:
        """Take over a connection that was let in, and does not block."""
        self.rank = rank
        self.name = f"rank {rank} at {address}"
        self.connection = connection
        self.unsent = memoryview(b"")
        self.num_read = 0
        self.controls: deque[bytes] = deque()
        self.is_lost = False
        self._arrived = bytearray()
        self._heard_s = time.monotonic()

    def flush(self) -> None:
        """Give the kernel what it takes of `unsent`."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                self.unsent = self.unsent[self.connection.send(self.unsent) :]

    def read(self) -> None:
        """Take in acknowledgements and control messages.

        Raises:
            ConnectionError: the rank has closed the connection, or sends what no rank would.
        """
        with contextlib.suppress(BlockingIOError):
            while True:
                arrived = self.connection.recv(_RECEIVE_BYTES)
                if not arrived:
                    raise ConnectionResetError(0, "its end of the connection is closed")
                self._arrived += arrived
                self._heard_s = time.monotonic()
                self._take_whole()

    def describe(self, num_sent: int) -> str:
        """Say how far the rank is."""
        age_s = time.monotonic() - self._heard_s
        return (
            f"{self.name} has read up to message {self.num_read} of {num_sent}, last heard of {age_s:.1f} s ago"
        )

    def _take_whole(self) -> None:
        """Take what has come whole out of what has come."""
        start = 0
        while len(self._arrived) - start >= UP.size:
            num_read, length = UP.unpack_from(self._arrived, start)
            if length > MAX_CONTROL_BYTES:
                raise ConnectionAbortedError(0, f"it announced a control message of {length} bytes")
            begin = start + UP.size
            if len(self._arrived) < begin + length:
                break
            self.num_read = num_read
            if length:
                self.controls.append(bytes(self._arrived[begin : begin + length]))
            start = begin + length
        del self._arrived[:start]
