"""One rank's end of the lanes to the coordinator on this host.

Knows nothing of what messages mean.
"""

from __future__ import annotations

import socket
import time

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError
from tprt.transport.channel import Buffer, Reader, Writer
from tprt.transport.handshake import MAX_CONTROL_BYTES, Welcome, WorkerHello, receive_welcome, send_hello
from tprt.transport.shm_ring import RingFds, RingGeometry, RingReader, RingWriter
from tprt.transport.zmq_overflow import OverflowReceiver, OverflowSender

# Between two attempts while the coordinator is not listening yet.
_RETRY_S = 0.02


class ShmWorkerLink:
    """The steps ring, the outputs ring on rank 0, and the control lane."""

    def __init__(self, rank: int, connection: socket.socket, welcome: Welcome, fds: list[int]) -> None:
        self._connection = connection
        geometry = RingGeometry(welcome.num_slots, welcome.slot_bytes)
        place = (rank, welcome.world_size)
        steps = RingFds(fds[0], (fds[1],), fds[2])
        self._steps = RingReader(steps, geometry, place, OverflowReceiver(welcome.steps_overflow))
        self._steps.watch_writer(connection.fileno(), self._raise_coordinator_lost)
        self._outputs: RingWriter | None = None
        if rank == 0:
            outputs = RingFds(fds[3], (fds[4],), fds[5])
            overflow = OverflowSender([welcome.outputs_overflow])
            self._outputs = RingWriter(outputs, geometry, 1, overflow)
            self._outputs.watch_readers([connection.fileno()], self._raise_coordinator_lost)

    @classmethod
    def connect(cls, path: str, *, epoch: int, rank: int, timeout_s: float) -> ShmWorkerLink:
        """Connect to the hub at `path`, which may begin to listen later.

        Raises:
            TransportTimeoutError: nobody listened or answered in time.
            PeerLostError: the coordinator went away.
            TransportError: it refuses this rank.
        """
        connection = _connect(path, timeout_s)
        try:
            connection.settimeout(timeout_s)
            send_hello(connection, WorkerHello(rank, epoch))
            welcome, fds = receive_welcome(connection)
        except TimeoutError:
            connection.close()
            raise TransportTimeoutError(f"the coordinator has not answered within {timeout_s:g} s") from None
        except ConnectionError as error:
            connection.close()
            raise PeerLostError(f"the coordinator went away: {error}") from error
        except TransportError:
            connection.close()
            raise
        return cls(rank, connection, welcome, fds)

    @property
    def steps(self) -> Reader:
        """Steps from the coordinator."""
        return self._steps

    @property
    def outputs(self) -> Writer | None:
        """Rank 0 only; None elsewhere."""
        return self._outputs

    def send_control(self, payload: Buffer, timeout_s: float) -> None:
        """Send a message on this rank's control lane.

        Raises:
            PeerLostError: the coordinator is gone.
            TransportTimeoutError: it does not read.
            TransportError: the message is too large.
        """
        if len(payload) > MAX_CONTROL_BYTES:
            raise TransportError(f"a control message of {len(payload)} bytes; at most {MAX_CONTROL_BYTES}")
        self._connection.settimeout(timeout_s)
        try:
            self._connection.send(payload)
        except TimeoutError:
            raise TransportTimeoutError(f"the coordinator has not read for {timeout_s:g} s") from None
        except ConnectionError as error:
            raise PeerLostError(f"the coordinator is gone: {error}") from error

    def close(self) -> None:
        """Release everything; idempotent."""
        self._steps.close()
        if self._outputs is not None:
            self._outputs.close()
        self._connection.close()

    def _raise_coordinator_lost(self) -> None:
        """The coordinator sends nothing on the control lane: that it is readable means that it has ended."""
        raise PeerLostError("the coordinator is gone")


def _connect(path: str, timeout_s: float) -> socket.socket:
    deadline_s = time.monotonic() + timeout_s
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while True:
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline_s:
                connection.close()
                raise TransportTimeoutError(f"nobody listens on {path} after {timeout_s:g} s") from None
            time.sleep(_RETRY_S)
        else:
            return connection
