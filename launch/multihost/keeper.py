"""Keeps the other hosts of one epoch: lets them in, has them start their ranks, and ends when one is lost.

Its end is seen, and its epoch ended, as that of a rank; when it is killed, the other hosts see their
connections end and kill their ranks. Knows nothing of how it is started.
"""

from __future__ import annotations

import select
import time
from collections.abc import Mapping

from launch.failure import ReportedCauseError
from launch.multihost.card import HostCard
from launch.multihost.door import Door
from launch.multihost.frames import FrameLane
from launch.multihost.news import BEAT, DONE, FAILED, START, pack, read_cause, unpack
from tprt.config import Config
from tprt.coordinator.cause import Cause, CauseKind
from tprt.errors import TransportError, TransportTimeoutError
from tprt.log import get_logger
from tprt.transport.heartbeat_relay import BeatImporter

_LOG = get_logger(__name__)
# Signs of life within the time after which a host is lost, and how much of it may pass without one, so that
# people learn of it before that time is over.
_BEATS = 10
_PATIENCE = 0.8


class HostKeeper:
    """The other hosts of one epoch."""

    def __init__(self, config: Config, beats: BeatImporter, door: Door) -> None:
        """Assign only."""
        self._has_started = False
        self._config = config
        self._hosts = config.hosts
        self._door = door
        self._beats = beats
        self._cards: dict[int, HostCard] = {}
        self._lanes: dict[int, FrameLane] = {}
        self._done: set[int] = set()
        self._beat_s = config.hosts.heartbeat_timeout_s / _BEATS
        self._next_beat_s = 0.0

    def run(self, epoch: int, env: Mapping[str, str]) -> None:
        """Gather the hosts, have them start, and keep them until their ranks have ended as they should.

        Args:
            epoch: number of the worker group.
            env: what their ranks find in their environment besides the usual.

        Raises:
            TransportTimeoutError: not all have come in time.
            ReportedCauseError: one is lost, or its ranks have failed.
        """
        self._gather()
        self._has_started = True
        for lane in self._lanes.values():
            lane.send(pack(START, {"epoch": epoch, "env": dict(env)}))
        while len(self._done) < len(self._lanes):
            self._take_in()
            self._raise_if_lost()

    def _gather(self) -> None:
        deadline_s = time.monotonic() + self._hosts.join_timeout_s
        while missing := sorted(set(range(1, self._hosts.nnodes)) - self._cards.keys()):
            if time.monotonic() > deadline_s:
                refused = self._door.last_refusal
                raise TransportTimeoutError(
                    f"of {self._hosts.nnodes} hosts, node ranks {missing} did not come to"
                    f" {self._hosts.rdzv_endpoint} within {self._hosts.join_timeout_s:g} s"
                    f" (hosts.join_timeout_s){f'; refused: {refused}' if refused else ''}"
                )
            self._take_in()
            self._forget_lost()
        for node_rank, card in sorted(self._cards.items()):
            address = self._lanes[node_rank].address
            _LOG.info("node rank %d is %s at %s", node_rank, card.host, address)

    def _take_in(self) -> None:
        """Wait for news or for the next sign of life, and take in what there is."""
        poll = select.poll()
        for fd in (*self._door.filenos(), *(lane.fileno() for lane in self._lanes.values() if not lane.loss)):
            poll.register(fd, select.POLLIN)
        poll.poll(max(0.0, self._next_beat_s - time.monotonic()) * 1000)
        if time.monotonic() >= self._next_beat_s:
            self._next_beat_s = time.monotonic() + self._beat_s
            for lane in self._lanes.values():
                lane.send(pack(BEAT))
        for node_rank, lane in self._lanes.items():
            for message in lane.receive():
                self._take(node_rank, message)
        for card, lane in self._door.admit(self._cards):
            self._seat(card, lane)

    def _take(self, node_rank: int, message: bytes) -> None:
        kind, content = unpack(message)
        if kind == BEAT:
            self._beats.write(node_rank, self._config.ranks_of(node_rank), content or ())
        elif kind == FAILED:
            raise ReportedCauseError(read_cause(content, self._name(node_rank)))
        elif kind == DONE:
            self._done.add(node_rank)
        else:
            raise TransportError(f"{self._name(node_rank)} sent {kind!r}; use one version of tprt")

    def _seat(self, card: HostCard, lane: FrameLane) -> None:
        """Take a host in, which may have been here before."""
        before = self._lanes.get(card.node_rank)
        if before is not None:
            before.close()
            if self._has_started:
                lane.close()
                self._lose(card.node_rank, "it had lost this host, and has come again")
        self._cards[card.node_rank] = card
        self._lanes[card.node_rank] = lane

    def _forget_lost(self) -> None:
        """Let hosts that are gone before the ranks have started come again."""
        for node_rank in [node_rank for node_rank in self._lanes if self._why_lost(node_rank)]:
            self._lanes.pop(node_rank).close()
            del self._cards[node_rank]

    def _raise_if_lost(self) -> None:
        for node_rank in self._lanes.keys() - self._done:
            if why := self._why_lost(node_rank):
                self._lose(node_rank, why)

    def _why_lost(self, node_rank: int) -> str:
        lane = self._lanes[node_rank]
        if not lane.loss and lane.silent_s > _PATIENCE * self._hosts.heartbeat_timeout_s:
            return f"nothing has been heard of it for {lane.silent_s:.1f} s (hosts.heartbeat_timeout_s)"
        return lane.loss

    def _lose(self, node_rank: int, why: str) -> None:
        text = f"{self._name(node_rank)} is lost: {why}"
        raise ReportedCauseError(Cause(CauseKind.SILENT_DEATH, text, is_from_outside=True))

    def _name(self, node_rank: int) -> str:
        return f"node rank {node_rank}, {self._cards[node_rank].host} at {self._lanes[node_rank].address}"
