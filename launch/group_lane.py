"""The supervisor's end of its lane to the coordinator.

Knows nothing of processes.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from tprt.errors import TransportError
from tprt.log import get_logger
from tprt.messages import EndGroup, GroupEnded, GroupReady, StartGroup
from tprt.transport.codec import decode, encode
from tprt.transport.control_lane import ControlReceiver, ControlSender

_LOG = get_logger(__name__)
# A coordinator that does not read for so long will not be missed: its clients notice that it is stuck.
_SEND_S = 1.0
Request = StartGroup | GroupReady | EndGroup


class GroupLane:
    """Requests of the coordinator in, the ends of worker groups out."""

    def __init__(self) -> None:
        self._connection, self._coordinators_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A socket object of its own, since a sender's deadlines would hold for the receiver as well.
        self._outgoing = self._connection.dup()
        self._sender = ControlSender(self._outgoing, "coordinator")
        self._receiver = ControlReceiver(self._connection)

    @property
    def coordinators_fd(self) -> int:
        """The descriptor that the coordinator inherits."""
        return self._coordinators_end.fileno()

    def close_coordinators_end(self) -> None:
        """Let go of what the coordinator has inherited, so that its end is seen here."""
        self._coordinators_end.close()

    def fileno(self) -> int:
        """A descriptor that is readable when `requests` has something; -1 once nothing more can come."""
        return -1 if self._receiver.is_lost else self._connection.fileno()

    def requests(self) -> Iterator[Request]:
        """Yield what the coordinator has asked for, without waiting."""
        while (payload := self._receiver.try_receive()) is not None:
            message = decode(payload)
            if isinstance(message, Request):
                yield message
            else:
                _LOG.error(
                    "the coordinator sent %s, which the supervisor does not expect", type(message).__name__
                )

    def send(self, message: GroupEnded) -> None:
        """Tell the coordinator that a group has ended, if it still listens."""
        with contextlib.suppress(TransportError):
            self._sender.send(b"".join(encode(message)), _SEND_S)

    def close(self) -> None:
        """Close both ends; idempotent."""
        self._connection.close()
        self._outgoing.close()
        self._coordinators_end.close()
