"""What the coordinator needs of whoever owns the processes of the ranks, and the lane for that.

The coordinator decides whether there is a next worker group; the supervisor starts and ends the processes, and
tells when all those of an epoch are gone. Knows nothing of how a process is started or ended.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from typing import Protocol

from tprt.coordinator.group_watch import GroupWatch
from tprt.errors import TransportError
from tprt.messages import EndGroup, GroupEnded, GroupReady, Message, StartGroup
from tprt.transport.channel import WorkerHub
from tprt.transport.codec import decode, encode
from tprt.transport.control_lane import ControlReceiver, ControlSender

_SEND_S = 5.0


class GroupKeeper(Protocol):
    """Whoever owns the processes of the ranks."""

    def open_hub(self, epoch: int) -> WorkerHub:
        """Return lanes to the ranks of a new epoch; the caller closes them."""

    def open_watch(self, epoch: int) -> GroupWatch | None:
        """Return the heartbeats of an epoch, if there are any; the caller closes them."""

    def start(self, epoch: int) -> None:
        """Start the ranks of `epoch`."""

    def is_ready(self, epoch: int) -> None:
        """Tell that every rank of `epoch` is ready."""

    def end(self, epoch: int, cause: str) -> None:
        """Kill the ranks of `epoch`; `receive` tells when they are gone."""

    def receive(self, timeout_s: float) -> GroupEnded | None:
        """Return the news that all ranks of an epoch are gone, or None when there is none in time.

        Raises:
            TransportError: nothing can come any more.
        """

    def fileno(self) -> int:
        """A descriptor that becomes readable when `receive` has something."""


class SupervisorLane:
    """The coordinator's end of its lane to the supervisor, a connected SOCK_SEQPACKET socket."""

    def __init__(
        self,
        connection: socket.socket,
        open_hub: Callable[[int], WorkerHub],
        open_watch: Callable[[int], GroupWatch],
    ) -> None:
        """Take the connection over, and what makes lanes and finds heartbeats for an epoch."""
        self._connection = connection
        # A socket object of its own, since a sender's deadlines would hold for the receiver as well.
        self._outgoing = connection.dup()
        self._sender = ControlSender(self._outgoing, "the supervisor")
        self._receiver = ControlReceiver(connection)
        self.open_hub = open_hub
        self.open_watch = open_watch

    def start(self, epoch: int) -> None:
        """Ask for the ranks of `epoch`."""
        self._send(StartGroup(epoch))

    def is_ready(self, epoch: int) -> None:
        """Tell that every rank of `epoch` is ready."""
        self._send(GroupReady(epoch))

    def end(self, epoch: int, cause: str) -> None:
        """Ask for the end of the ranks of `epoch`."""
        self._send(EndGroup(epoch, cause))

    def receive(self, timeout_s: float) -> GroupEnded | None:
        """Return the news of an end, or None when there is none in time.

        Raises:
            TransportError: the supervisor is gone, or says what it should not.
        """
        deadline_s = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while (payload := self._receiver.try_receive()) is None:
            if self._receiver.is_lost:
                raise TransportError("the supervisor is gone")
            if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                return None
        message = decode(payload)
        if not isinstance(message, GroupEnded):
            raise TransportError(f"the supervisor sent {type(message).__name__}; expected GroupEnded")
        return message

    def fileno(self) -> int:
        """A descriptor that becomes readable when `receive` has something."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._connection.close()
        self._outgoing.close()

    def _send(self, message: Message) -> None:
        self._sender.send(b"".join(encode(message)), _SEND_S)
