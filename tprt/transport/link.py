"""One rank's end of the lanes to the coordinator on this host.

Knows nothing of what messages mean.
"""

from __future__ import annotations

import contextlib
import socket

from tprt.transport.channel import Buffer, Reader, Writer
from tprt.transport.control_lane import ControlSender
from tprt.transport.handshake import Welcome, join
from tprt.transport.large_message import LargeMessageReceiver, LargeMessageSender
from tprt.transport.ring_reader import RingReader
from tprt.transport.ring_writer import RingWriter
from tprt.transport.shm_ring import RingFds

_COORDINATOR = "the coordinator"
# Memory, eventfd of the one reader, eventfd of the writer.
_FDS_OF_RING = 3


class ShmWorkerLink:
    """The ring of steps, the ring of outputs on rank 0, and the control lane."""

    def __init__(self, rank: int, connection: socket.socket, said: Welcome, fds: list[int]) -> None:
        """Open the lanes; `connection` and `fds` are the link's from now on."""
        self._connection = connection
        self._control = ControlSender(connection, _COORDINATOR)
        self._rings = [
            RingFds.from_list(fds[at : at + _FDS_OF_RING]) for at in range(0, len(fds), _FDS_OF_RING)
        ]
        self._steps = RingReader(self._rings[0], rank, _COORDINATOR, LargeMessageReceiver(said.large_steps))
        self._steps.watch(connection.fileno())
        self._outputs: RingWriter | None = None
        if rank == 0:
            large = LargeMessageSender([said.large_outputs])
            self._outputs = RingWriter(self._rings[1], [_COORDINATOR], large)
            self._outputs.watch(0, connection.fileno())
        self._is_open = True

    @classmethod
    def connect(cls, path: str, *, epoch: int, rank: int, timeout_s: float) -> ShmWorkerLink:
        """Connect to the hub at `path`, which may begin to listen later.

        Raises:
            TransportTimeoutError: nobody listened or answered in time.
            PeerLostError: the coordinator went away.
            TransportError: it refuses this rank; says why.
        """
        return cls(rank, *join(path, epoch, rank, timeout_s))

    @property
    def steps(self) -> Reader:
        """Steps from the coordinator."""
        return self._steps

    @property
    def outputs(self) -> Writer | None:
        """Rank 0 only; None elsewhere."""
        return self._outputs

    def send_control(self, payload: Buffer, timeout_s: float) -> None:
        """Send a message on this rank's control lane; any thread may.

        Raises:
            TransportTimeoutError: the coordinator does not read.
            PeerLostError: it is gone.
            TransportError: the message is too large.
        """
        self._control.send(payload, timeout_s)

    def close(self) -> None:
        """Release everything; idempotent. The coordinator sees it as the loss of this rank."""
        if not self._is_open:
            return
        self._is_open = False
        self._steps.close()
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._connection.close)
            if self._outputs is not None:
                self._outputs.close()
        for ring in self._rings:
            ring.close()
