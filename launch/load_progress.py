"""How far all ranks have loaded, for whoever waits: a bar on a terminal, records in a JSON log.

Reads heartbeats; asks no rank. Knows nothing of how weights are read.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from tprt.config import LoggingConfig
from tprt.transport.heartbeat import HeartbeatReader, RankBeat

_BETWEEN_RECORDS_S = 0.5


class LoadProgress:
    """Shows the bytes in place, of all ranks together, while a deployment starts."""

    def __init__(
        self, logging: LoggingConfig, open_heartbeats: Sequence[Callable[[], HeartbeatReader | None]]
    ) -> None:
        """`open_heartbeats`, for each replica, returns None before there are any."""
        self._is_json = logging.format == "json"
        self._is_recorded = self._is_json and logging.level in ("debug", "info")
        self._open_heartbeats = open_heartbeats
        self._readers: dict[int, HeartbeatReader] = {}
        self._last_record_s = time.monotonic()
        self._last_bytes = 0
        self._bar = Progress(
            TextColumn("loading"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[ranks]}"),
            console=Console(file=sys.stderr),
            refresh_per_second=5,
            disable=self._is_json or not sys.stderr.isatty(),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=None, ranks="")

    def update(self) -> None:
        """Show where the ranks are."""
        if self._bar.disable and not self._is_recorded:
            return
        for number, open_heartbeats in enumerate(self._open_heartbeats):
            if number not in self._readers and (reader := open_heartbeats()) is not None:
                self._readers[number] = reader
        if len(self._readers) == len(self._open_heartbeats):
            self._show([beat for number in sorted(self._readers) for beat in self._readers[number].read()])

    def _show(self, beats: Sequence[RankBeat]) -> None:
        done, total = (sum(getattr(beat, name) for beat in beats) for name in ("done_bytes", "total_bytes"))
        if not self._bar.disable:
            phases = sorted({beat.phase for beat in beats})
            words = ", ".join(phase.words for phase in phases)
            self._bar.update(self._task, completed=done, total=total or None, ranks=words)
        else:
            self._record(done, total, [beat.done_bytes for beat in beats])

    def _record(self, done: int, total: int, by_rank: Sequence[int]) -> None:
        now_s = time.monotonic()
        if done == self._last_bytes or now_s - self._last_record_s < _BETWEEN_RECORDS_S:
            return
        self._last_record_s, self._last_bytes = now_s, done
        entry = {"event": "loading", "done_bytes": done, "total_bytes": total, "by_rank": list(by_rank)}
        print(json.dumps({"time_s": round(time.time(), 3), "process": "launcher"} | entry), file=sys.stderr)

    def __enter__(self) -> LoadProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        for reader in self._readers.values():
            reader.close()
