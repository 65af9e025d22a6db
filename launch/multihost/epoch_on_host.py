"""The ranks of one epoch on a host other than that of node rank 0, and the connection that goes with them.

The connection's end is the end of the ranks, and the other way round. Knows nothing of how the host came to
have the connection.
"""

from __future__ import annotations

import select
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.child import STEPS_TOKEN
from launch.child_log import STDERR, LogTee
from launch.failure import cause_of
from launch.multihost.frames import FrameLane
from launch.multihost.news import BEAT, DONE, START, pack, pack_cause, unpack
from launch.rank_group import RankGroup
from launch.rank_specs import make_rank_specs
from launch.run_dir import heartbeats_path
from tprt.config import Config
from tprt.coordinator.cause import Cause, CauseKind, first_cause
from tprt.errors import TransportError
from tprt.transport.heartbeat import HeartbeatReader, Phase
from tprt.transport.heartbeat_relay import BeatExporter

_BEATS = 10
# Deaths within this time of the first are looked at together. Shorter than on the host of node rank 0, which
# waits for what this one has to say.
_GATHER_S = 0.05
# The connection is closed by node rank 0 once it has ended the other ranks.
_CLOSE_S = 10.0


class EpochOnHost:
    """One connection to node rank 0."""

    def __init__(
        self, config: Config, run_dir: Path, lane: FrameLane, tee: LogTee, own: Mapping[str, str]
    ) -> None:
        """Assign; the lane stays the caller's. `own` has the `interface` of the ranks and their `token`."""
        self._config = config
        self._run_dir = run_dir
        self._lane = lane
        self._tee = tee
        self._own = own
        self._group: RankGroup | None = None
        self._beats: BeatExporter | None = None
        self._beat_s = config.hosts.heartbeat_timeout_s / _BEATS
        self._next_beat_s = 0.0

    def run(self) -> str:
        """Run the ranks once told to, and return why they have not ended in order; empty if they have."""
        while not (why := self._why_over()):
            self._take_in(self._wait())
            if self._has_ended_in_order():
                self._lane.send(pack(DONE))
                return ""
        return "" if self._was_told_to_end() else why

    def end(self) -> None:
        """Kill what runs; idempotent."""
        group, self._group = self._group, None
        if self._beats is not None:
            self._beats.close()
            self._beats = None
        if group is not None:
            group.end()

    def why_told_to_end(self) -> Cause:
        """Return the cause to give when this process was told to end, as torchrun does when a rank is lost."""
        lost = [cause_of(death) for death in (self._group.deaths() if self._group else ())]
        told = Cause(CauseKind.SILENT_DEATH, "a host was told to end", is_from_outside=True)
        return first_cause([*lost, told])

    def _why_over(self) -> str:
        lane, timeout_s = self._lane, self._config.hosts.heartbeat_timeout_s
        if lane.loss:
            return f"the host of node rank 0 has ended this group of ranks: {lane.loss}"
        if lane.silent_s > timeout_s:
            return f"nothing has been heard of the host of node rank 0 for {lane.silent_s:.1f} s"
        return self._failure()

    def _failure(self) -> str:
        """Tell node rank 0 of ranks that have failed, and wait until it has ended the others."""
        group = self._group
        if group is None or not (group.has_lost_adopted() or any(child.exit_code for child in group.children)):
            return ""
        time.sleep(_GATHER_S)
        for child in group.children:
            child.log.read()
        cause = first_cause([cause_of(death) for death in group.deaths() if death.exit_code != 0])
        return self._give_up(cause)

    def _give_up(self, cause: Cause) -> str:
        self._lane.send(pack_cause(cause))
        self.end()
        deadline_s = time.monotonic() + _CLOSE_S
        while not self._lane.loss and (left_s := deadline_s - time.monotonic()) > 0:
            self._lane.wait_for_message(min(left_s, self._beat_s))
        return cause.gist

    def _has_ended_in_order(self) -> bool:
        group = self._group
        return group is not None and all(child.exit_code == 0 for child in group.children)

    def _was_told_to_end(self) -> bool:
        """Tell whether the deployment ends in order, and these ranks have not come to their end in time."""
        if self._group is None or any(child.exit_code for child in self._group.children):
            return False
        reader = HeartbeatReader.open(heartbeats_path(self._run_dir, self._group.epoch))
        beats = reader.read()
        reader.close()
        return all(beats[child.rank or 0].phase == Phase.SHUTDOWN for child in self._group.children)

    def _wait(self) -> set[int]:
        """Return the descriptors that have something, or none once a sign of life is due."""
        poller = select.poll()
        children = [] if self._group is None else self._group.children
        pidfds = [child.pidfd for child in children if child.exit_code is None]
        for fd in (self._lane.fileno(), *pidfds, *(child.log.fileno() for child in children)):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        if self._tee.has_backlog:
            poller.register(STDERR, select.POLLOUT)
        left_s = max(0.0, self._next_beat_s - time.monotonic())
        return {fd for fd, _ in poller.poll(left_s * 1000)}

    def _take_in(self, ready: set[int]) -> None:
        self._tee.flush()
        for child in () if self._group is None else self._group.children:
            if child.log.fileno() in ready:
                child.log.read()
        for message in self._lane.receive():
            kind, content = unpack(message)
            if kind == START:
                self._start(content)
            elif kind != BEAT:
                raise TransportError(f"the host of node rank 0 sent {kind!r}; use one version of tprt")
        if time.monotonic() >= self._next_beat_s:
            self._next_beat_s = time.monotonic() + self._beat_s
            self._lane.send(pack(BEAT, self._beats.export() if self._beats is not None else []))

    def _start(self, content: Mapping[str, Any]) -> None:
        epoch, config = int(content["epoch"]), self._config
        env = {**content["env"], STEPS_TOKEN: self._own["token"]}
        specs = make_rank_specs(config, self._run_dir, epoch, self._own["interface"])
        specs = [replace(spec, env={**spec.env, **env}) for spec in specs]
        size = config.parallel.tensor_parallel_size
        self._group = RankGroup(self._run_dir, epoch, specs, self._tee, size)
        failure = self._group.start()
        if failure is not None:
            self._lane.loss = self._give_up(Cause(CauseKind.OWN_ERROR, failure))
            return
        ranks = config.ranks_of(config.hosts.node_rank)
        self._beats = BeatExporter(heartbeats_path(self._run_dir, epoch), ranks)
