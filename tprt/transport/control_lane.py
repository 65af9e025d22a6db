"""Control messages over a connected SOCK_SEQPACKET socket: boundaries kept, the end of the peer seen at once.

The kernel limits a packet by the send buffer, so a message goes in pieces that are marked as first and last. A
message that was given up half-way is forgotten when the next one begins. Knows nothing of what the messages
mean.
"""

from __future__ import annotations

import socket
import threading
import time

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError
from tprt.log import get_logger
from tprt.transport.channel import Buffer

_LOG = get_logger(__name__)

MAX_CONTROL_BYTES = 16 * 1024 * 1024
_PIECE_BYTES = 32_000
# Room for a whole traceback, so that a failing rank need not wait for a busy hub; the kernel gives what its
# net.core.wmem_max allows, twice 208 KiB by default.
_SEND_BUFFER_BYTES = 1024 * 1024
_FIRST = 1
_LAST = 2


class ControlSender:
    """The sending end; any thread may use it."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        """Take a connection, which stays the caller's; `peer` is what to call the other end in an error."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._connection = connection
        self._peer = peer
        self._lock = threading.Lock()

    def send(self, payload: Buffer, timeout_s: float) -> None:
        """Send one message.

        Raises:
            TransportTimeoutError: the peer does not read.
            PeerLostError: it is gone.
            TransportError: the message is larger than `MAX_CONTROL_BYTES`.
        """
        data = memoryview(payload).cast("B")
        if len(data) > MAX_CONTROL_BYTES:
            raise TransportError(
                f"a control message of {len(data)} bytes; expected at most {MAX_CONTROL_BYTES}"
            )
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            try:
                for start in range(0, max(len(data), 1), _PIECE_BYTES):
                    end = start + _PIECE_BYTES
                    flags = (_FIRST if start == 0 else 0) | (_LAST if end >= len(data) else 0)
                    self._send_piece(flags, data[start:end], deadline_s)
            except TimeoutError as error:
                raise TransportTimeoutError(
                    f"{self._peer} has not read its control lane for {timeout_s:g} s"
                ) from error
            except OSError as error:
                raise PeerLostError(f"{self._peer} is gone: {error.strerror}") from error

    def _send_piece(self, flags: int, piece: memoryview, deadline_s: float) -> None:
        # A timeout of 0 would make the socket non-blocking, with another error for "not now".
        self._connection.settimeout(max(deadline_s - time.monotonic(), 1e-3))
        self._connection.sendmsg([bytes((flags,)), piece])


class ControlReceiver:
    """The receiving end; it never waits."""

    def __init__(self, connection: socket.socket) -> None:
        """Assign; the connection stays the caller's."""
        self.is_lost = False
        self._connection = connection
        self._pieces: list[bytes] = []
        self._num_bytes = 0

    def try_receive(self) -> bytes | None:
        """Return the next message if all of it is there; `is_lost` is True from when nothing more can come."""
        while not self.is_lost:
            try:
                packet = self._connection.recv(_PIECE_BYTES + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except OSError:
                packet = b""
            # A packet has a byte of flags at least: an empty one is the end.
            if not packet:
                self.is_lost = True
            elif (message := self._add(packet[0], packet[1:])) is not None:
                return message
        return None

    def _add(self, flags: int, piece: bytes) -> bytes | None:
        if flags & _FIRST:
            self._pieces.clear()
            self._num_bytes = 0
        self._pieces.append(piece)
        self._num_bytes += len(piece)
        if self._num_bytes > MAX_CONTROL_BYTES:
            _LOG.error("a control message runs past %d bytes; the lane is given up", MAX_CONTROL_BYTES)
            self.is_lost = True
        return b"".join(self._pieces) if flags & _LAST else None
