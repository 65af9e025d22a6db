"""Whole messages over one TCP connection between two hosts of a deployment; nothing here waits unless asked to.

A message is its length and its bytes. Knows nothing of what they mean.
"""

from __future__ import annotations

import select
import socket
import struct
import time

from tprt.transport.remote_wire import set_options

_LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 64 * 1024
# Of somebody who has proven nothing yet, and of a host of this deployment.
_STRANGERS_BYTES = 256 * 1024
_HOSTS_BYTES = 16 * 1024 * 1024


class FrameLane:
    """One end of a connection.

    Attributes:
        connection: the socket.
        address: where the other end is.
        loss: why nothing can come any more; empty while something can.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Take a connected socket over."""
        connection.setblocking(False)
        set_options(connection)
        self.connection = connection
        self.address = str(connection.getpeername()[0])
        self.loss = ""
        self._heard_s = time.monotonic()
        self._limit = _STRANGERS_BYTES
        self._arrived = bytearray()
        self._whole: list[bytes] = []
        self._unsent = bytearray()

    def fileno(self) -> int:
        """The descriptor of the connection."""
        return self.connection.fileno()

    def trust(self) -> None:
        """Allow the longer messages of a host of this deployment."""
        self._limit = _HOSTS_BYTES

    @property
    def silent_s(self) -> float:
        """Seconds since anything has come."""
        return time.monotonic() - self._heard_s

    def send(self, message: bytes) -> None:
        """Send a message as far as the kernel takes it, and the rest with the next calls."""
        self._unsent += _LENGTH.pack(len(message)) + message
        if len(self._unsent) > _HOSTS_BYTES:
            self.loss = self.loss or "it does not read what is sent to it"
        self._flush()

    def receive(self) -> list[bytes]:
        """Return the messages that have come whole; `loss` tells when no more can come."""
        self._flush()
        while not self.loss:
            try:
                arrived = self.connection.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                self.loss = str(error.strerror)
                break
            if not arrived:
                self.loss = "the connection was closed"
            else:
                self._heard_s = time.monotonic()
                self._arrived += arrived
        self._take_whole()
        messages, self._whole = self._whole, []
        return messages

    def wait_for_message(self, timeout_s: float) -> bytes | None:
        """Return the next message; None when it does not come in time. `receive` has those after it."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        deadline_s = time.monotonic() + timeout_s
        while not (messages := self.receive()):
            left_s = deadline_s - time.monotonic()
            if self.loss or left_s <= 0:
                return None
            poll.poll(left_s * 1000)
        first, *self._whole = messages
        return first

    def close(self) -> None:
        """Close the connection; idempotent."""
        self.connection.close()

    def _flush(self) -> None:
        try:
            while self._unsent and not self.loss:
                del self._unsent[: self.connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            self.loss = str(error.strerror)

    def _take_whole(self) -> None:
        while len(self._arrived) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._arrived)
            end = _LENGTH.size + length
            if length > self._limit:
                self.loss = self.loss or f"it announced a message of {length} bytes"
                break
            if len(self._arrived) < end:
                break
            self._whole.append(bytes(self._arrived[_LENGTH.size : end]))
            del self._arrived[:end]
