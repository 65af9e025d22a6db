"""The coordinator's end of all lanes to the ranks of one epoch on this host.

Knows nothing of what messages mean and of who starts the ranks.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from dataclasses import dataclass

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError
from tprt.log import get_logger
from tprt.transport.channel import ControlEvent, Writer
from tprt.transport.handshake import (
    MAX_CONTROL_BYTES,
    Welcome,
    WorkerHello,
    receive_hello,
    refuse,
    send_welcome,
)
from tprt.transport.shm_ring import RingFds, RingGeometry, RingReader, RingWriter
from tprt.transport.zmq_overflow import OverflowReceiver, OverflowSender

_LOG = get_logger(__name__)
_SPIN_S = 40e-6


@dataclass(frozen=True, slots=True)
class Control:
    """A rank's control message, or, with payload None, the loss of that rank."""

    rank: int
    payload: bytes | None


class ShmWorkerHub:
    """Rings to and from the ranks, and a control lane for each."""

    def __init__(self, listener: socket.socket, path: str, epoch: int, world_size: int) -> None:
        self._listener = listener
        self._path = path
        self._epoch = epoch
        self._world_size = world_size
        self._lanes: dict[int, socket.socket] = {}
        self._rank_of: dict[int, int] = {}
        self._lost: set[int] = set()
        self._poller = select.poll()
        self._geometry = RingGeometry()
        self._steps_fds = RingFds.create(self._geometry, world_size)
        self._outputs_fds = RingFds.create(self._geometry, 1)
        self._steps = RingWriter(
            self._steps_fds, self._geometry, world_size, OverflowSender(self._step_overflows())
        )
        self._outputs = RingReader(
            self._outputs_fds, self._geometry, (0, 1), OverflowReceiver(self._output_overflow())
        )
        self._is_open = True

    @classmethod
    def listen(cls, path: str, *, epoch: int, world_size: int) -> ShmWorkerHub:
        """Listen for ranks on the unix socket `path`, which must not exist.

        Raises:
            TransportError: the path cannot be used.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(path)
        except OSError as error:
            listener.close()
            raise TransportError(f"cannot listen on {path}: {error}") from error
        listener.listen(world_size)
        return cls(listener, path, epoch, world_size)

    @property
    def steps(self) -> Writer:
        """The lane to every rank."""
        return self._steps

    def accept_all(self, timeout_s: float) -> None:
        """Wait until every rank has connected.

        Raises:
            TransportTimeoutError: names the ranks that are missing.
            PeerLostError: a rank that had connected is gone.
        """
        deadline_s = time.monotonic() + timeout_s
        waiting: dict[int, socket.socket] = {}
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        try:
            while len(self._lanes) < self._world_size:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    missing = sorted(set(range(self._world_size)) - self._lanes.keys())
                    raise TransportTimeoutError(f"ranks {missing} have not connected within {timeout_s:g} s")
                for fd, _ in poller.poll(left_s * 1000):
                    if fd == self._listener.fileno():
                        connection, _ = self._listener.accept()
                        waiting[connection.fileno()] = connection
                        poller.register(connection, select.POLLIN)
                    elif fd in waiting:
                        poller.unregister(fd)
                        self._greet(waiting.pop(fd))
                        poller = self._with_lanes(poller)
                    else:
                        self._raise_if_lost(fd)
        finally:
            for connection in waiting.values():
                connection.close()
        self._steps.watch_readers(self.filenos(), self._raise_if_any_lost)

    def receive_output(self, timeout_s: float) -> bytes | ControlEvent:
        """Wait for rank 0's next output; a control event of any rank comes first when there is one.

        Raises:
            TransportTimeoutError: nothing came in time.
        """
        deadline_s = time.monotonic() + timeout_s
        output = self._outputs.spin(min(_SPIN_S, timeout_s))
        while output is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(f"rank 0 has not answered within {timeout_s:g} s")
            if self._outputs.sleep(left_s) and (event := self.receive_control(0.0)) is not None:
                return event
            output = self._outputs.try_receive()
        return output

    def receive_control(self, timeout_s: float) -> ControlEvent | None:
        """Return the next control event, or None when there is none in time (0: do not wait)."""
        for fd, _ in self._poller.poll(timeout_s * 1000):
            rank = self._rank_of[fd]
            payload = _receive(self._lanes[rank])
            if not payload:
                self._forget(rank, fd)
            return Control(rank, payload or None)
        return None

    def filenos(self) -> list[int]:
        """Descriptors of the control lanes, for a poller."""
        return [lane.fileno() for rank, lane in self._lanes.items() if rank not in self._lost]

    def close(self) -> None:
        """Release everything; idempotent. Ranks see it as the loss of the coordinator."""
        if not self._is_open:
            return
        self._is_open = False
        for connection in (self._listener, *self._lanes.values()):
            connection.close()
        self._steps.close()
        self._outputs.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _greet(self, connection: socket.socket) -> None:
        """Give a rank its lanes, or refuse whoever it is."""
        try:
            hello = receive_hello(connection)
            self._check(hello)
        except (TransportError, OSError) as error:
            _LOG.warning("refused a connection: %s", error)
            refuse(connection, str(error))
            return
        steps, outputs = self._steps_fds, self._outputs_fds
        fds = [steps.memory, steps.readers[hello.rank], steps.writer]
        if hello.rank == 0:
            fds += [outputs.memory, *outputs.readers, outputs.writer]
        welcome = Welcome(
            num_slots=self._geometry.num_slots,
            slot_bytes=self._geometry.slot_bytes,
            world_size=self._world_size,
            steps_overflow=self._step_overflows()[hello.rank],
            outputs_overflow=self._output_overflow(),
        )
        send_welcome(connection, welcome, fds)
        self._lanes[hello.rank] = connection
        self._rank_of[connection.fileno()] = hello.rank
        self._poller.register(connection, select.POLLIN)
        self._outputs.watch_writer(connection.fileno(), lambda: None)

    def _check(self, hello: WorkerHello) -> None:
        if hello.epoch != self._epoch:
            raise TransportError(f"rank {hello.rank} is of epoch {hello.epoch}; expected {self._epoch}")
        if hello.rank not in range(self._world_size):
            raise TransportError(f"rank {hello.rank} of world size {self._world_size}")
        if hello.rank in self._lanes:
            raise TransportError(f"rank {hello.rank} has connected already")

    def _with_lanes(self, poller: select.poll) -> select.poll:
        """Also watch the ranks that have their lanes: one may go before the last has come."""
        for lane in self._lanes.values():
            poller.register(lane, select.POLLHUP)
        return poller

    def _raise_if_lost(self, fd: int) -> None:
        raise PeerLostError(f"rank {self._rank_of[fd]} went away before all ranks had connected")

    def _raise_if_any_lost(self) -> None:
        """Say which rank has gone, or has something to say, while a step waits for room."""
        for fd, _ in self._poller.poll(0):
            raise PeerLostError(f"rank {self._rank_of[fd]} has reported or is gone, and does not read")

    def _forget(self, rank: int, fd: int) -> None:
        self._lost.add(rank)
        self._poller.unregister(fd)
        self._outputs.unwatch(fd)

    def _step_overflows(self) -> list[str]:
        return [f"ipc://{self._path}.s{rank}" for rank in range(self._world_size)]

    def _output_overflow(self) -> str:
        return f"ipc://{self._path}.out"


def _receive(lane: socket.socket) -> bytes:
    try:
        return lane.recv(MAX_CONTROL_BYTES)
    except ConnectionError:
        return b""
