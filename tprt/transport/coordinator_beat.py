"""The coordinator's line among the heartbeats: what it has finished and what waits, to tell health from.

Who keeps this knows whether requests make progress, which no rank can tell. Knows nothing of how the
coordinator schedules.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns

from tprt.transport.heartbeat import NO_STEP
from tprt.transport.heartbeat_file import COORDINATOR_LINE, BeatMap

_TIME_NS, _EPOCH, _RESTARTS, _SERVES, _STEP, _STEP_NS, _RUNNING, _WAITING, _OLDEST_NS, _PID = range(10)


@dataclass(frozen=True, slots=True)
class CoordinatorRecord:
    """What the coordinator has written last.

    Attributes:
        time_ns: monotonic nanoseconds of the last word.
        epoch: the worker group that it drives.
        restarts: worker groups that have been replaced so far.
        serves: whether all ranks of this epoch were ready.
        step: number of the last step that was finished in this epoch; `NO_STEP` before the first.
        step_ns: monotonic nanoseconds of that; before the first, of the moment when the ranks were ready.
        num_running, num_waiting: requests that are computed, and that wait for a place.
        oldest_waiting_ns: when the oldest of those that wait came, in monotonic nanoseconds; 0 if none waits.
        pid: its process.
    """

    time_ns: int
    epoch: int
    restarts: int
    serves: bool
    step: int
    step_ns: int
    num_running: int
    num_waiting: int
    oldest_waiting_ns: int
    pid: int


class CoordinatorBeat:
    """The coordinator's line, for the coordinator; each epoch has a file of its own."""

    def __init__(self, mapped: BeatMap) -> None:
        """Use `open`."""
        self._map = mapped
        self._words = mapped.line(COORDINATOR_LINE)

    @classmethod
    def open(cls, path: str | Path, epoch: int, restarts: int = 0) -> CoordinatorBeat:
        """Open the line in the file at `path` and sign it; the ranks of `epoch` are not ready yet.

        Raises:
            TransportError: the file is missing, or is no heartbeat file of this version.
        """
        beat = cls(BeatMap(path, writable=True))
        words = beat._words
        words[_EPOCH], words[_RESTARTS], words[_SERVES], words[_STEP] = epoch, restarts, 0, NO_STEP
        words[_TIME_NS] = monotonic_ns()
        words[_PID] = os.getpid()
        return beat

    def begin_serving(self) -> None:
        """Note that all ranks are ready."""
        self._words[_STEP_NS] = self._words[_TIME_NS] = monotonic_ns()
        self._words[_SERVES] = 1

    def finish_step(self, step: int) -> None:
        """Note that step number `step` has been answered."""
        self._words[_STEP] = step
        self._words[_STEP_NS] = self._words[_TIME_NS] = monotonic_ns()

    def set_requests(self, num_running: int, num_waiting: int, oldest_waiting_ns: int = 0) -> None:
        """Note how many requests run and wait, and when the oldest that waits came (0: none waits)."""
        words = self._words
        words[_RUNNING], words[_WAITING], words[_OLDEST_NS] = num_running, num_waiting, oldest_waiting_ns
        words[_TIME_NS] = monotonic_ns()

    def close(self) -> None:
        """Let go of the file; idempotent."""
        self._words.release()
        self._map.close()


def read_coordinator(path: str | Path) -> CoordinatorRecord | None:
    """Return what the coordinator wrote last into the file at `path`; None before it has opened it.

    Raises:
        TransportError: the file is missing, or is no heartbeat file of this version.
    """
    mapped = BeatMap(path)
    words = mapped.line(COORDINATOR_LINE)
    try:
        return _record(words) if words[_PID] else None
    finally:
        words.release()
        mapped.close()


def _record(words: memoryview) -> CoordinatorRecord:
    return CoordinatorRecord(
        time_ns=words[_TIME_NS],
        epoch=words[_EPOCH],
        restarts=words[_RESTARTS],
        serves=bool(words[_SERVES]),
        step=words[_STEP],
        step_ns=words[_STEP_NS],
        num_running=words[_RUNNING],
        num_waiting=words[_WAITING],
        oldest_waiting_ns=words[_OLDEST_NS],
        pid=words[_PID],
    )
