"""Where every rank is, from its heartbeat and from what the kernel tells of its process.

Asks no rank, and reads some files of /proc: tens of microseconds a rank. Knows nothing of how it is shown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tprt.errors import TransportError
from tprt.transport.heartbeat import NO_STEP, HeartbeatReader, RankBeat

Heartbeats = Callable[[], HeartbeatReader | None]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class RankView:
    """One rank at one moment.

    Attributes:
        beat: its last sign of life.
        age_s: time since that; None before the first.
        state: the state letter of its process, as in proc(5); "" when it is not there.
        step_lag: steps by which it is behind the rank that is furthest.
        resident_bytes: memory of its process, shared pages included; None when it is not on this host.
    """

    beat: RankBeat
    age_s: float | None
    state: str
    step_lag: int
    resident_bytes: int | None


def look_at_ranks(heartbeats: Heartbeats) -> list[RankView]:
    """Return every rank of the newest epoch, in rank order; none before there are heartbeats.

    Args:
        heartbeats: opens them; what it returns is closed here.
    """
    try:
        reader = heartbeats()
    except TransportError:
        # An epoch that ends takes its file along.
        return []
    if reader is None:
        return []
    beats = reader.read()
    reader.close()
    furthest = max((beat.step for beat in beats), default=NO_STEP)
    now_ns = time.monotonic_ns()
    return [_view(beat, furthest, now_ns) for beat in beats]


def _view(beat: RankBeat, furthest: int, now_ns: int) -> RankView:
    return RankView(
        beat=beat,
        age_s=max(0, now_ns - beat.time_ns) / 1e9 if beat.time_ns else None,
        state=beat.state,
        step_lag=furthest - beat.step,
        resident_bytes=_resident_bytes(beat.pid) if beat.pid and not beat.host else None,
    )


def _resident_bytes(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return None
