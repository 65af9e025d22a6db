"""The coordinator's end of all lanes to the ranks of one epoch on this host.

A ring takes steps to all ranks, another one brings outputs from rank 0, and each rank has a control lane whose
end is the end of its process. Knows nothing of what messages mean and of who starts the ranks.
"""

from __future__ import annotations

import select
import socket
import time

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError
from tprt.log import get_logger
from tprt.transport.channel import ControlEvent, Writer
from tprt.transport.control_lane import ControlReceiver
from tprt.transport.handshake import Welcome, WorkerHello, check_path, welcome
from tprt.transport.large_message import LargeMessageReceiver, LargeMessageSender
from tprt.transport.ring_reader import RingReader
from tprt.transport.ring_writer import RingWriter
from tprt.transport.shm_ring import RingFds, RingGeometry
from tprt.transport.worker_listener import WorkerListener
from tprt.transport.zmq_socket import remove_socket_file

_LOG = get_logger(__name__)

# 4 MiB: a message of 1 MiB takes 0.1 ms in a slot and ten times that through the lane for large ones.
DEFAULT_STEPS = RingGeometry(num_slots=4, slot_bytes=1024 * 1024)
DEFAULT_OUTPUTS = RingGeometry(slot_bytes=64 * 1024)


class _Lane:
    """The hub's end of one rank's control lane."""

    def __init__(self, hello: WorkerHello, connection: socket.socket) -> None:
        self.rank = hello.rank
        self.pid = hello.pid
        self.connection = connection
        self.receiver = ControlReceiver(connection)


class ShmWorkerHub:
    """Lanes to and from the ranks of one epoch, over shared memory; used by one thread."""

    def __init__(
        self, listener: WorkerListener, path: str, world_size: int, steps: RingGeometry, outputs: RingGeometry
    ) -> None:
        self._listener = listener
        self._world_size = world_size
        self._large_steps = [f"ipc://{path}.s{rank}" for rank in range(world_size)]
        self._large_outputs = f"ipc://{path}.out"
        self._steps_fds = RingFds.create(steps, world_size)
        self._outputs_fds = RingFds.create(outputs, 1)
        names = [f"rank {rank}" for rank in range(world_size)]
        self._steps = RingWriter(self._steps_fds, names, LargeMessageSender(self._large_steps))
        self._outputs = RingReader(self._outputs_fds, 0, "rank 0", LargeMessageReceiver(self._large_outputs))
        self._lanes: dict[int, _Lane] = {}
        self._control = select.epoll()
        self._control_poll = select.poll()
        self._all_poll = select.poll()
        for fd in self.filenos():
            self._control_poll.register(fd, select.POLLIN)
            self._all_poll.register(fd, select.POLLIN)
        self._all_poll.register(self._outputs.fileno(), select.POLLIN)
        self._is_open = True

    @classmethod
    def listen(
        cls,
        path: str,
        *,
        epoch: int,
        world_size: int,
        geometry: RingGeometry = DEFAULT_STEPS,
        outputs_geometry: RingGeometry = DEFAULT_OUTPUTS,
    ) -> ShmWorkerHub:
        """Listen for ranks on the unix socket `path`, in a folder that is private to this deployment.

        Large messages use sockets beside it, whose names begin with that of `path`.

        Args:
            path: the socket.
            epoch: number of the worker group; ranks of another one are refused.
            world_size: number of ranks.
            geometry: size of the ring for steps.
            outputs_geometry: size of the ring for outputs.

        Raises:
            TransportError: the path cannot be used.
        """
        check_path(f"{path}.s{world_size - 1}")
        check_path(f"{path}.out")
        listener = WorkerListener(path, epoch, world_size)
        try:
            return cls(listener, path, world_size, geometry, outputs_geometry)
        except TransportError:
            listener.close()
            raise

    @property
    def steps(self) -> Writer:
        """The lane to every rank."""
        return self._steps

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the ranks that have connected, by rank, as the kernel tells them."""
        return {lane.rank: lane.pid for lane in self._lanes.values()}

    def accept_all(self, timeout_s: float) -> None:
        """Wait until every rank has connected.

        Ranks are also let in while one of the `receive` methods runs; this is the wait for all of them.

        Raises:
            TransportTimeoutError: names the ranks that are missing.
            PeerLostError: a rank that had connected is gone; `receive_control` has what it said before.
        """
        deadline_s = time.monotonic() + timeout_s
        while missing := self._listener.missing:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(
                    f"of {self._world_size} ranks, {missing} have not connected after {timeout_s:g} s"
                )
            # Hang-ups alone: what a rank says meanwhile stays in its lane.
            poll = select.poll()
            poll.register(self._listener, select.POLLIN)
            for fd in self._lanes:
                poll.register(fd, 0)
            for fd, _ in poll.poll(left_s * 1000):
                if fd in self._lanes:
                    raise PeerLostError(
                        f"{self._name(self._lanes[fd])} went away before {missing} had connected"
                    )
                self._let_in()

    def receive_output(self, timeout_s: float) -> bytes | ControlEvent:
        """Wait for rank 0's next output, or a control event of any rank when no output is there.

        What was answered before a rank failed is worth having.

        Raises:
            TransportTimeoutError: neither came in time; names the ranks that have not read all steps.
            SequenceGapError: an output was lost.
            PeerLostError: rank 0 went away in the middle of a large output, and no control event tells of it.
        """
        deadline_s = time.monotonic() + timeout_s
        if timeout_s > 0:
            self._outputs.spin()
        while (received := self.try_receive_output()) is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                behind = self.describe_behind() or "all ranks have read every step"
                raise TransportTimeoutError(f"rank 0 has not answered within {timeout_s:g} s; {behind}")
            self._all_poll.poll(left_s * 1000)
        return received

    def try_receive_output(self) -> bytes | ControlEvent | None:
        """Return what `receive_output` would, or None when nothing is there; see there for what is raised."""
        try:
            if (output := self._outputs.try_receive()) is not None:
                return output
        except PeerLostError:
            # What rank 0 said before it went tells more.
            if (event := self.receive_control(0.0)) is not None:
                return event
            raise
        return self.receive_control(0.0)

    def describe_behind(self) -> str:
        """Name the ranks that have not read every step and say how far they are; empty if there are none."""
        return self._steps.describe_behind()

    @property
    def outputs_fileno(self) -> int:
        """A descriptor that becomes readable when an output may be there."""
        return self._outputs.fileno()

    def receive_control(self, timeout_s: float) -> ControlEvent | None:
        """Return the next control event, or None when there is none in time (0: do not wait)."""
        deadline_s = time.monotonic() + timeout_s
        left_s = timeout_s
        while True:
            ready = {fd for fd, _ in self._control_poll.poll(max(left_s, 0.0) * 1000)}
            if self._listener.fileno() in ready:
                self._let_in()
            if self._control.fileno() in ready and (event := self._next_event()) is not None:
                return event
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return None

    def filenos(self) -> list[int]:
        """Descriptors for a poller; one becomes readable when `receive_control` has something to do."""
        return [self._control.fileno(), self._listener.fileno()]

    def close(self) -> None:
        """Release everything; idempotent. Ranks see it as the loss of the coordinator."""
        if not self._is_open:
            return
        self._is_open = False
        self._listener.close()
        for lane in self._lanes.values():
            lane.connection.close()
        self._control.close()
        self._steps.close()
        self._outputs.close()
        self._steps_fds.close()
        self._outputs_fds.close()
        # A rank that was killed has left its socket.
        for address in self._large_steps:
            remove_socket_file(address)

    def _let_in(self) -> None:
        for hello, connection in self._listener.admit():
            fds = self._steps_fds.of_reader(hello.rank).to_list()
            if hello.rank == 0:
                fds += self._outputs_fds.to_list()
            try:
                welcome(connection, Welcome(self._large_steps[hello.rank], self._large_outputs), fds)
            except OSError as error:
                # Its lane reports the loss.
                _LOG.warning("rank %d went away at once: %s", hello.rank, error.strerror)
            self._lanes[connection.fileno()] = _Lane(hello, connection)
            self._control.register(connection, select.EPOLLIN)
            self._steps.watch(hello.rank, connection.fileno())
            if hello.rank == 0:
                self._outputs.watch(connection.fileno())

    def _next_event(self) -> ControlEvent | None:
        # One event at a time: what is left stays in the kernel, and the descriptors stay readable.
        for fd, _ in self._control.poll(0):
            lane = self._lanes[fd]
            message = lane.receiver.try_receive()
            if message is not None:
                return ControlEvent(lane.rank, message)
            if lane.receiver.is_lost:
                self._control.unregister(fd)
                self._steps.mark_lost(lane.rank)
                return ControlEvent(lane.rank, None)
        return None

    @staticmethod
    def _name(lane: _Lane) -> str:
        return f"rank {lane.rank} (process {lane.pid})"
