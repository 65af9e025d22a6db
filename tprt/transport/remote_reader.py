"""Steps for a rank on another host than the coordinator's; `tprt.transport.remote_wire` has the protocol.

Knows nothing of what messages mean.
"""

from __future__ import annotations

import select
import socket
import time

from tprt.errors import PeerLostError, SequenceGapError, TransportError, TransportTimeoutError
from tprt.transport.remote_wire import (
    ACK,
    FRAME,
    LENGTH,
    MAX_FRAME_BYTES,
    pack_hello,
    set_options,
    split_address,
)

_RETRY_S = 0.05
_RECEIVE_BYTES = 256 * 1024


class RemoteStepReader:
    """One receiving end of a `RemoteStepWriter`."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        """Take a connection that was let in; it is the reader's from now on."""
        self._connection = connection
        self._peer = peer
        self._arrived = bytearray()
        self._sequence = 0
        self._loss = ""
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        connection.setblocking(False)

    @classmethod
    def connect(
        cls, address: str, *, epoch: int, rank: int, token: bytes, timeout_s: float
    ) -> RemoteStepReader:
        """Connect to the writer at `address`, which may begin to listen later.

        Args:
            address: as `RemoteStepWriter.address` says.
            epoch: number of the worker group.
            rank: this rank.
            token: the secret of this deployment.
            timeout_s: longest wait, in seconds.

        Raises:
            TransportTimeoutError: nobody listened or answered in time.
            PeerLostError: the coordinator went away.
            TransportError: it refuses this rank; says why.
        """
        connection = _connect(address, time.monotonic() + timeout_s, timeout_s)
        try:
            connection.sendall(pack_hello(epoch, rank, token))
            (length,) = LENGTH.unpack(_receive_exactly(connection, LENGTH.size))
            reason = _receive_exactly(connection, length).decode()
        except TimeoutError as error:
            connection.close()
            raise TransportTimeoutError(
                f"the coordinator at {address} did not answer in {timeout_s:g} s"
            ) from error
        except OSError as error:
            connection.close()
            raise PeerLostError(f"the coordinator at {address} went away: {error.strerror}") from error
        if reason:
            connection.close()
            raise TransportError(f"the coordinator refuses rank {rank}: {reason}")
        return cls(connection, f"the coordinator at {address}")

    def fileno(self) -> int:
        """A descriptor that becomes readable when a message may be there; `try_receive` decides.

        Wait on it only after `try_receive` has returned None.
        """
        return self._connection.fileno()

    def receive(self, timeout_s: float) -> bytes:
        """Wait for the next message and return it.

        Raises:
            TransportTimeoutError: nothing came in time.
            PeerLostError: the coordinator is gone and nothing is left to read.
            SequenceGapError: another message than the next one came.
        """
        deadline_s = time.monotonic() + timeout_s
        while (message := self.try_receive()) is None:
            if self._loss:
                raise PeerLostError(self._loss)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(
                    f"{self._peer} has sent nothing for {timeout_s:g} s; waiting for message"
                    f" {self._sequence + 1}"
                )
            self._poll.poll(left_s * 1000)
        return message

    def try_receive(self) -> bytes | None:
        """Return the next message if all of it is there; see `receive` for what is raised."""
        while (message := self._take()) is None and not self._loss:
            try:
                arrived = self._connection.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return None
            except OSError as error:
                self._lose(str(error.strerror))
            else:
                self._arrived += arrived
                if not arrived:
                    self._lose("its end of the connection is closed")
        return message

    def close(self) -> None:
        """Release everything; idempotent. The writer sees it as the loss of this rank."""
        self._connection.close()

    def _take(self) -> bytes | None:
        if len(self._arrived) < FRAME.size:
            return None
        sequence, size = FRAME.unpack_from(self._arrived)
        if sequence != self._sequence + 1 or size > MAX_FRAME_BYTES:
            raise SequenceGapError(
                f"message {sequence} of {size} bytes from {self._peer} came; expected message"
                f" {self._sequence + 1} of at most {MAX_FRAME_BYTES}"
            )
        end = FRAME.size + size
        if len(self._arrived) < end:
            return None
        message = bytes(memoryview(self._arrived)[FRAME.size : end])
        del self._arrived[:end]
        self._sequence = sequence
        self._acknowledge()
        return message

    def _acknowledge(self) -> None:
        try:
            # Eight bytes, and no more of them under way than the writer's window: they always fit.
            self._connection.send(ACK.pack(self._sequence))
        except OSError as error:
            self._lose(str(error.strerror))

    def _lose(self, why: str) -> None:
        self._loss = self._loss or f"{self._peer} is gone: {why}; the last message read was {self._sequence}"


def _connect(address: str, deadline_s: float, timeout_s: float) -> socket.socket:
    host_and_port = split_address(address)
    while True:
        left_s = deadline_s - time.monotonic()
        try:
            connection = socket.create_connection(host_and_port, max(left_s, _RETRY_S))
        except OSError as error:
            if left_s <= 0:
                raise TransportTimeoutError(
                    f"no coordinator listens at {address} after {timeout_s:g} s: {error.strerror or error}"
                ) from error
            time.sleep(_RETRY_S)
        else:
            set_options(connection)
            connection.settimeout(max(deadline_s - time.monotonic(), _RETRY_S))
            return connection


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    received = connection.recv(num_bytes, socket.MSG_WAITALL) if num_bytes else b""
    while len(received) < num_bytes:
        more = connection.recv(num_bytes - len(received))
        if not more:
            raise ConnectionResetError(0, "it closed the connection")
        received += more
    return received
