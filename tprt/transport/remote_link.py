"""One rank's end of the lanes to a coordinator on another host.

Knows nothing of what messages mean.
"""

from __future__ import annotations

from tprt.transport.channel import Buffer, Reader, Writer
from tprt.transport.remote_reader import RemoteStepReader


class RemoteWorkerLink:
    """Steps and control messages over one TCP connection; rank 0, which answers, is never on another host."""

    def __init__(self, steps: RemoteStepReader) -> None:
        """Take the connection over."""
        self._steps = steps

    @classmethod
    def connect(
        cls, address: str, *, epoch: int, rank: int, token: bytes, timeout_s: float
    ) -> RemoteWorkerLink:
        """Connect to the hub at `address`, `tcp://host:port`; raises what `RemoteStepReader.connect` does."""
        reader = RemoteStepReader.connect(address, epoch=epoch, rank=rank, token=token, timeout_s=timeout_s)
        return cls(reader)

    @property
    def steps(self) -> Reader:
        """Steps from the coordinator."""
        return self._steps

    @property
    def outputs(self) -> Writer | None:
        """None: only rank 0 has outputs."""
        return None

    def send_control(self, payload: Buffer, timeout_s: float) -> None:
        """Send a message, which must not be empty, on this rank's control lane; any thread may.

        Raises:
            TransportTimeoutError: the coordinator does not read.
            PeerLostError: it is gone.
            TransportError: the message is too large.
        """
        self._steps.send_control(payload, timeout_s)

    def close(self) -> None:
        """Release everything; idempotent. The coordinator sees it as the loss of this rank."""
        self._steps.close()
