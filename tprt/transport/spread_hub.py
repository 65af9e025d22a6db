"""The coordinator's end of all lanes to the ranks of one epoch that are on this host and on others.

Ranks 0 to n - 1 are here, through shared memory, the others come over TCP. Knows nothing of what messages mean.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence

from tprt.errors import TransportTimeoutError
from tprt.transport.channel import Buffer, ControlEvent, Writer
from tprt.transport.hub import ShmWorkerHub
from tprt.transport.remote_writer import RemoteStepWriter


class _SpreadWriter:
    """Steps to the ranks here and there."""

    def __init__(self, local: Writer, remote: RemoteStepWriter) -> None:
        self._local = local
        self._remote = remote

    def send(self, parts: Sequence[Buffer], timeout_s: float) -> None:
        """Send the concatenation of `parts` to every rank; see `Writer.send`."""
        # So that nobody gets what others have no room for.
        self._remote.wait_for_room(timeout_s)
        self._local.send(parts, timeout_s)
        self._remote.send(parts, timeout_s)

    def close(self) -> None:
        """Does nothing: the hub closes its lanes."""


class SpreadWorkerHub:
    """A hub of this host's ranks and a writer to those of others, as one `WorkerHub`; used by one thread."""

    def __init__(self, local: ShmWorkerHub, remote: RemoteStepWriter) -> None:
        """Take both over."""
        self._local = local
        self._remote = remote
        self._steps = _SpreadWriter(local.steps, remote)
        self._control_poll = select.poll()
        self._all_poll = select.poll()
        for fd in self.filenos():
            self._control_poll.register(fd, select.POLLIN)
            self._all_poll.register(fd, select.POLLIN)
        self._all_poll.register(local.outputs_fileno, select.POLLIN)

    @property
    def steps(self) -> Writer:
        """The lane to every rank."""
        return self._steps

    def accept_all(self, timeout_s: float) -> None:
        """Wait until every rank has connected; see `WorkerHub.accept_all`."""
        deadline_s = time.monotonic() + timeout_s
        self._local.accept_all(timeout_s)
        self._remote.accept_all(max(0.0, deadline_s - time.monotonic()))

    def receive_output(self, timeout_s: float) -> bytes | ControlEvent:
        """Wait for rank 0's next output or a control event; see `WorkerHub.receive_output`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if (received := self._local.try_receive_output()) is not None:
                return received
            if (event := self._remote.next_event()) is not None:
                return event
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransportTimeoutError(
                    f"rank 0 has not answered within {timeout_s:g} s; {self._describe_behind()}"
                )
            self._all_poll.poll(left_s * 1000)

    def receive_control(self, timeout_s: float) -> ControlEvent | None:
        """Return the next control event, or None when there is none in time (0: do not wait)."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            event = self._local.receive_control(0.0) or self._remote.next_event()
            left_s = deadline_s - time.monotonic()
            if event is not None or left_s <= 0:
                return event
            self._control_poll.poll(left_s * 1000)

    def _describe_behind(self) -> str:
        behind = filter(None, (self._local.describe_behind(), self._remote.describe_behind()))
        return "; ".join(behind) or "all ranks have read every step"

    def filenos(self) -> list[int]:
        """Descriptors for a poller; one becomes readable when `receive_control` has something to do."""
        return [*self._local.filenos(), self._remote.fileno()]

    def close(self) -> None:
        """Release everything; idempotent. Ranks see it as the loss of the coordinator."""
        self._local.close()
        self._remote.close()
