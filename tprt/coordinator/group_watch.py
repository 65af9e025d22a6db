"""One worker group's heartbeats, as the coordinator uses them: whether ranks are stuck, and its own line.

The file is made by whoever starts the ranks, so it may come a little later than this; until then nothing is
known and nothing is noted. Knows nothing of lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tprt.coordinator.stall import StallReport
from tprt.coordinator.stall_probe import StallProbe
from tprt.transport.coordinator_beat import CoordinatorBeat
from tprt.transport.heartbeat import HeartbeatReader, Phase
from tprt.transport.peer_process import is_stopped


@dataclass(frozen=True, slots=True)
class _Open:
    reader: HeartbeatReader
    probe: StallProbe
    beat: CoordinatorBeat


class GroupWatch:
    """The heartbeats of one epoch."""

    def __init__(self, heartbeats: Path, stack_paths: Sequence[Path], epoch: int) -> None:
        """Assign only.

        Args:
            heartbeats: the file.
            stack_paths: where each rank writes its Python stacks.
            epoch: number of the worker group, and of those before it that were replaced.
        """
        self._path = heartbeats
        self._stack_paths = stack_paths
        self._epoch = epoch
        self._files: _Open | None = None

    def begin_wait(self, step: int | None) -> None:
        """Note that the ranks are waited for from now on: for step number `step`, or, if None, to get ready."""
        if (files := self._open()) is not None:
            files.probe.begin_wait(step)

    def find_stall(self, timeout_s: float) -> StallReport | None:
        """Return who holds up the step in flight if no rank has shown progress for `timeout_s`."""
        files = self._open()
        return files.probe.report() if files and files.probe.has_stalled(timeout_s) else None

    def find_stuck_start(self, timeout_s: float) -> StallReport | None:
        """Return who holds up the start if no rank has shown progress for `timeout_s` and none will.

        That is so when one is stopped, or when each waits in a collective or for its first step. Otherwise a
        start has long phases without a sign: importing torch, joining a group, packing weights.
        """
        files = self._open()
        if files is None or not files.probe.has_stalled(timeout_s):
            return None
        beats = files.reader.read()
        is_any_stopped = any(is_stopped(beat.state) for beat in beats if beat.pid)
        do_all_wait = all(beat.inside or beat.phase == Phase.IDLE for beat in beats)
        return files.probe.report() if is_any_stopped or do_all_wait else None

    def where_all_are(self) -> str:
        """Return in words where the ranks are, for the report of a deadline that has passed."""
        files = self._open()
        return "" if files is None else str(files.probe.report())

    def begin_serving(self) -> None:
        """Note that all ranks are ready."""
        if (files := self._open()) is not None:
            files.beat.begin_serving()

    def finish_step(self, step: int) -> None:
        """Note that step number `step` has been answered."""
        if self._files is not None:
            self._files.beat.finish_step(step)

    def set_requests(self, num_running: int, num_waiting: int, oldest_waiting_ns: int) -> None:
        """Note how many requests run and wait, and when the oldest that waits came (0: none waits)."""
        if self._files is not None:
            self._files.beat.set_requests(num_running, num_waiting, oldest_waiting_ns)

    def close(self) -> None:
        """Let go of the file; idempotent."""
        files, self._files = self._files, None
        if files is not None:
            files.beat.close()
            files.probe.close()

    def _open(self) -> _Open | None:
        if self._files is None and self._path.exists():
            reader = HeartbeatReader.open(self._path)
            beat = CoordinatorBeat.open(self._path, self._epoch, restarts=self._epoch)
            self._files = _Open(reader, StallProbe(reader, self._stack_paths), beat)
        return self._files
