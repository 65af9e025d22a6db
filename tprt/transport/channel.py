"""What every transport offers, whatever carries the bytes: protocols, and the one record that they share.

A message is opaque bytes here; `tprt.transport.codec` turns it into a type of `tprt.messages`. Every wait
takes a deadline in seconds. Knows nothing of sockets or shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class Writer(Protocol):
    """The one sender of an ordered lane; every reader gets every message once, in order."""

    def send(self, parts: Sequence[Buffer], timeout_s: float) -> None:
        """Send the concatenation of `parts` as one message.

        Raises:
            TransportTimeoutError: a reader did not make room in time; the message names the rank.
            PeerLostError: a reader is gone.
        """

    def close(self) -> None:
        """Release everything; idempotent."""


class Reader(Protocol):
    """One receiving end of a lane."""

    def receive(self, timeout_s: float) -> bytes:
        """Wait for the next message and return a copy of it.

        Raises:
            TransportTimeoutError: nothing came in time.
            PeerLostError: the writer is gone and nothing is left to read.
            SequenceGapError: a message was lost.
        """

    def try_receive(self) -> bytes | None:
        """Return the next message if it is there."""

    def fileno(self) -> int:
        """A descriptor that becomes readable when a message may be there; `try_receive` decides.

        Wait on it only after `try_receive` has returned None.
        """

    def close(self) -> None:
        """Release everything; idempotent."""


@dataclass(frozen=True, slots=True)
class ControlEvent:
    """What a rank's control lane brought.

    Attributes:
        rank: whose lane.
        payload: the message, or None when the rank's end of the lane was closed: the process is gone.
    """

    rank: int
    payload: bytes | None


class WorkerHub(Protocol):
    """The coordinator's end of all lanes to one worker group (one epoch)."""

    @property
    def steps(self) -> Writer:
        """`StepInput` and `Shutdown` to every rank."""

    def accept_all(self, timeout_s: float) -> None:
        """Wait until every rank has connected.

        Raises:
            TransportTimeoutError: names the ranks that are missing.
            PeerLostError: a rank that had connected is gone; `receive_control` has what it said before.
        """

    def receive_output(self, timeout_s: float) -> bytes | ControlEvent:
        """Wait for rank 0's next output, or a control event of any rank when no output is there.

        Raises:
            TransportTimeoutError: neither came in time; names the ranks that have not read all steps.
            SequenceGapError: an output was lost.
        """

    def receive_control(self, timeout_s: float) -> ControlEvent | None:
        """Return the next control event, or None when there is none in time (0: do not wait)."""

    def filenos(self) -> list[int]:
        """Descriptors for a poller; one becomes readable when `receive_control` has something to do."""

    def close(self) -> None:
        """Release everything; idempotent. Ranks see it as the loss of the coordinator."""


class WorkerLink(Protocol):
    """One rank's end of the lanes to the coordinator."""

    @property
    def steps(self) -> Reader: ...

    @property
    def outputs(self) -> Writer | None:
        """Rank 0 only; None elsewhere."""

    def send_control(self, payload: Buffer, timeout_s: float) -> None:
        """Send a message on this rank's control lane; any thread may.

        Raises:
            TransportTimeoutError: the coordinator does not read.
            PeerLostError: it is gone.
        """

    def close(self) -> None:
        """Release everything; idempotent."""
