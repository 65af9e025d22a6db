"""A lane to a replica that is lost already when its client starts: nothing comes and nothing goes."""

from __future__ import annotations

from collections.abc import Sequence

from tprt.transport.channel import Buffer


class NoLane:
    """Stands for the connection.

    Attributes:
        loss: why there is none.
    """

    loss: str | None = "the replica had failed before this process started"

    def send(self, parts: Sequence[Buffer]) -> None:
        """Drop it."""

    def receive(self, timeout_s: float) -> bytes | None:
        """Return None, at once."""
        return None

    def filenos(self) -> tuple[int, ...]:
        """Return none."""
        return ()

    def close(self, flush: bool = True) -> None:
        """Do nothing."""
