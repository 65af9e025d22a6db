"""What the coordinator needs of the lane to its clients.

Knows nothing of what carries it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tprt.transport.channel import Buffer


class ClientLane(Protocol):
    """The coordinator's end of the lane to all clients."""

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """Return the next message with its sender, or None when there is none in time (0: do not wait)."""

    def send(self, client_id: bytes, parts: Sequence[Buffer]) -> None:
        """Send the concatenation of `parts` to one client.

        Raises:
            PeerLostError: that client is gone.
        """

    def fileno(self) -> int:
        """A descriptor that becomes readable when something comes after `receive` has returned None."""
