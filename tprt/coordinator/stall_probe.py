"""Watches the heartbeats of a group while a step is in flight, and collects what a report on a stall needs.

Nothing here waits for a rank: heartbeats and /proc are read, and a stack has half a second to come. Knows
nothing of lanes and of what happens to a group that is stuck.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic_ns

from tprt.coordinator.stall import GroupView, StallReport, describe_stall
from tprt.transport.heartbeat import HeartbeatReader
from tprt.transport.peer_process import request_stack


class StallProbe:
    """The heartbeats of one group, for whoever waits for it."""

    def __init__(self, reader: HeartbeatReader, stack_paths: Sequence[Path]) -> None:
        """Assign only.

        Args:
            reader: the heartbeats; closed by `close`.
            stack_paths: where each rank writes its Python stacks.
        """
        self._reader = reader
        self._stack_paths = stack_paths
        self._step: int | None = None
        self._since_ns = monotonic_ns()

    def begin_wait(self, step: int | None) -> None:
        """Note that the ranks are told to run step number `step` just now; None: to get ready."""
        self._step = step
        self._since_ns = monotonic_ns()

    def has_stalled(self, timeout_s: float) -> bool:
        """Whether neither a rank has given a sign nor the wait begun for `timeout_s`; takes a microsecond."""
        last_ns = max(self._since_ns, self._reader.last_change_ns())
        return monotonic_ns() - last_ns > timeout_s * 1e9

    def report(self) -> StallReport:
        """Say who holds up the group, with the Python stacks of that rank if it can still give them."""
        beats = self._reader.read()
        view = GroupView(
            beats=beats,
            states=[beat.state for beat in beats],
            now_ns=monotonic_ns(),
            since_ns=self._since_ns,
            step=self._step,
            host=socket.gethostname(),
        )
        report = describe_stall(view)
        # Where no rank is to blame, one stack shows what all of them are in.
        beat = beats[report.rank or 0]
        can_ask = beat.pid and not beat.host
        stack = request_stack(beat.pid, self._stack_paths[beat.rank]) if can_ask else ""
        return replace(report, stack=stack)

    def close(self) -> None:
        """Let go of the heartbeats; idempotent."""
        self._reader.close()
