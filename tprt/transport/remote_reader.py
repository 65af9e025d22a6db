"""The lanes of a rank on another host than the coordinator's; `tprt.transport.remote_wire` has the protocol.

Knows nothing of what messages mean.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

from tprt.errors import PeerLostError, SequenceGapError, TransportError, TransportTimeoutError
from tprt.transport.challenge import make_nonce
from tprt.transport.channel import Buffer
from tprt.transport.control_lane import MAX_CONTROL_BYTES
from tprt.transport.remote_wire import (
    ANSWER,
    FRAME,
    GREETING,
    MAX_FRAME_BYTES,
    UP,
    is_answer_proven,
    pack_hello,
    read_greeting,
    set_options,
    split_address,
)

_RETRY_S = 0.05
_RECEIVE_BYTES = 256 * 1024
_MAX_REASON_BYTES = 4096
_ACKNOWLEDGE_S = 5.0


class RemoteStepReader:
    """One receiving end of a `RemoteStepWriter`."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        """Take a connection that was let in; it is the reader's from now on."""
        self._connection = connection
        self._peer = peer
        self._arrived = bytearray()
        self._sequence = 0
        self._loss = ""
        # A control message may come from another thread than the one that reads.
        self._sending = threading.Lock()
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
            reason = _introduce(connection, epoch, rank, token)
        except TimeoutError as error:
            connection.close()
            raise TransportTimeoutError(
                f"the coordinator at {address} did not answer in {timeout_s:g} s"
            ) from error
        except OSError as error:
            connection.close()
            raise PeerLostError(f"the coordinator at {address} went away: {error.strerror}") from error
        except TransportError as error:
            connection.close()
            raise TransportError(f"the coordinator at {address}: {error}") from error
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

    def send_control(self, payload: Buffer, timeout_s: float) -> None:
        """Send a message the other way; any thread may.

        Raises:
            TransportTimeoutError: the coordinator does not read.
            PeerLostError: it is gone.
            TransportError: the message is too large.
        """
        data = memoryview(payload).cast("B")
        if len(data) > MAX_CONTROL_BYTES:
            raise TransportError(
                f"a control message of {len(data)} bytes; expected at most {MAX_CONTROL_BYTES}"
            )
        with self._sending:
            self._send_all(UP.pack(self._sequence, len(data)) + data, timeout_s)

    def _send_all(self, data: Buffer, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        unsent = memoryview(data)
        poll = select.poll()
        poll.register(self._connection, select.POLLOUT)
        while unsent:
            if not poll.poll(max(deadline_s - time.monotonic(), 0.0) * 1000):
                # Whatever comes after half a message would be taken for the rest of it.
                self._lose("it does not read what this rank sends")
                raise TransportTimeoutError(f"{self._peer} has not read its control lane for {timeout_s:g} s")
            try:
                unsent = unsent[self._connection.send(unsent) :]
            except BlockingIOError:
                continue
            except OSError as error:
                self._lose(str(error.strerror))
                raise PeerLostError(self._loss) from error

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
        # Waits only behind a large control message that the writer has not read yet.
        with self._sending, contextlib.suppress(PeerLostError, TransportTimeoutError):
            self._send_all(UP.pack(self._sequence, 0), _ACKNOWLEDGE_S)

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


def _introduce(connection: socket.socket, epoch: int, rank: int, token: bytes) -> str:
    """Say who this is, and return why it is not let in ("": it is).

    Raises:
        TransportError: whoever answers is no coordinator of this deployment.
    """
    theirs, ours = read_greeting(_receive_exactly(connection, GREETING.size)), make_nonce()
    connection.sendall(pack_hello(epoch, rank, ours, theirs, token))
    proof, length = ANSWER.unpack(_receive_exactly(connection, ANSWER.size))
    if length > _MAX_REASON_BYTES:
        raise TransportError(f"an answer of {length} bytes; expected at most {_MAX_REASON_BYTES}")
    reason = _receive_exactly(connection, length).decode(errors="replace")
    if not reason and not is_answer_proven(proof, ours, token):
        raise TransportError("it does not know the token of this deployment")
    return reason


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    received = connection.recv(num_bytes, socket.MSG_WAITALL) if num_bytes else b""
    while len(received) < num_bytes:
        more = connection.recv(num_bytes - len(received))
        if not more:
            raise ConnectionResetError(0, "it closed the connection")
        received += more
    return received
