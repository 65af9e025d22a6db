"""Where other hosts come in: node rank 0's listening socket, and who is taken in.

Knows nothing of what the hosts are told afterwards.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from launch.multihost.card import HostCard, why_refused
from launch.multihost.clock import clock_s, skew_words
from launch.multihost.frames import FrameLane
from launch.multihost.handshake import pack_answer, pack_greeting, read_hello
from tprt.log import get_logger
from tprt.transport.challenge import make_nonce

_LOG = get_logger(__name__)
_MAX_STRANGERS = 64
# Whoever has not said hello by then is somebody else.
_HELLO_S = 10.0


@dataclass(slots=True)
class _Stranger:
    lane: FrameLane
    nonce: bytes = field(default_factory=make_nonce)
    came_s: float = field(default_factory=time.monotonic)


class Door:
    """Lets the hosts of one deployment in.

    Attributes:
        last_refusal: whom it has refused last, and why; empty before the first.
    """

    def __init__(self, listener: socket.socket, own: HostCard, nnodes: int, secret: bytes) -> None:
        """Assign; the listener stays the caller's."""
        listener.setblocking(False)
        self.last_refusal = ""
        self._listener = listener
        self._own = own
        self._nnodes = nnodes
        self._secret = secret
        self._strangers: list[_Stranger] = []

    def filenos(self) -> list[int]:
        """Descriptors for a poller; one is readable when `admit` has something to do."""
        return [self._listener.fileno(), *(stranger.lane.fileno() for stranger in self._strangers)]

    def admit(self, taken: Mapping[int, HostCard]) -> list[tuple[HostCard, FrameLane]]:
        """Take in who has come, without waiting; `taken` are the hosts that are there, by node rank.

        A host that is there already may come again: it has given its other connection up.
        """
        self._accept()
        admitted = []
        for stranger in list(self._strangers):
            messages = stranger.lane.receive()
            if messages and (card := self._check(stranger, messages[0], taken)) is not None:
                self._strangers.remove(stranger)
                admitted.append((card, stranger.lane))
            elif messages or stranger.lane.loss or time.monotonic() - stranger.came_s > _HELLO_S:
                self._strangers.remove(stranger)
                stranger.lane.close()
        return admitted

    def close(self) -> None:
        """Let go of who has not said hello; idempotent."""
        for stranger in self._strangers:
            stranger.lane.close()
        self._strangers.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while len(self._strangers) < _MAX_STRANGERS:
                connection, _ = self._listener.accept()
                stranger = _Stranger(FrameLane(connection))
                self._strangers.append(stranger)
                stranger.lane.send(pack_greeting(stranger.nonce))

    def _check(self, stranger: _Stranger, message: bytes, taken: Mapping[int, HostCard]) -> HostCard | None:
        """Answer a hello; return the card of a host that is taken in."""
        said, card = read_hello(message, stranger.nonce, self._secret)
        reason = said.error or self._why_refused(card, taken)
        if reason:
            self.last_refusal = f"{stranger.lane.address}: {reason}"
            _LOG.warning("refused a host at %s", self.last_refusal)
        elif card is not None and card.clock_s is not None and (words := skew_words(card.clock_s, clock_s())):
            _LOG.warning("node rank %d, %s: %s", card.node_rank, card.host, words)
        stranger.lane.send(pack_answer(reason, said.nonce, self._secret))
        stranger.lane.trust()
        return None if reason else card

    def _why_refused(self, card: HostCard | None, taken: Mapping[int, HostCard]) -> str:
        assert card is not None
        reason = why_refused(self._own, card, self._nnodes)
        there = taken.get(card.node_rank)
        if not reason and there is not None and there.instance != card.instance:
            reason = (
                f"node rank {card.node_rank} is there already, on {there.host}; give every host a --node-rank"
                " of its own"
            )
        return reason
