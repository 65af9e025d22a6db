"""Heartbeats: every rank notes where it is in its line of a mapped file, readable without asking it.

The words of a line are not read at one instant: who reads while its owner moves on sees one step of that. What
must belong together, the number of a collective, its kind and whether the rank is inside, shares a word. The
monotonic clock is the same for all processes of a host, so ages can be taken across them.

Knows nothing of why a rank does not move on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from time import monotonic_ns

from tprt.errors import TransportError
from tprt.transport.heartbeat_file import LINE_BYTES, RANK_LINE, BeatMap
from tprt.transport.peer_process import process_state

BEFORE_LAYERS = -1
AFTER_LAYERS = -2
NO_STEP = -1

# The words of a rank's line.
_TIME_NS, _EPOCH, _STEP, _PHASE, _LAYER, _COLLECTIVE, _PID, _DONE, _TOTAL = range(9)
TIME_WORD, PID_WORD, HOST_WORD, STATE_WORD = _TIME_NS, _PID, 9, 10
"""Words for `tprt.transport.heartbeat_relay`; host and state are 0 in the file of a rank's host."""
# The word of a collective: its number, 7 bits for the kind, and a bit for "inside".
_NUMBER_SHIFT, _KIND_SHIFT, _INSIDE = 8, 1, 1
_KIND_MASK = 0x7F


class Phase(IntEnum):
    """The phases of a rank's life in their order, with the words that people read."""

    words: str

    def __new__(cls, number: int, words: str) -> Phase:
        """Make the phase that is stored as `number`."""
        phase = int.__new__(cls, number)
        phase._value_ = number
        phase.words = words
        return phase

    SPAWN = 0, "spawn"
    IMPORT = 1, "import"
    START = 2, "start"
    GROUP_INIT = 3, "process-group init"
    LOAD = 4, "load"
    KV_ALLOCATION = 5, "KV allocation"
    IDLE = 6, "idle"
    PREFILL = 7, "prefill"
    DECODE = 8, "decode"
    SHUTDOWN = 9, "shutdown"


# What a rank may wait in, by the names that the methods of `Collectives` have.
COLLECTIVE_KINDS = ("", "all_reduce", "all_gather", "broadcast", "min_int", "barrier")
_KIND_BITS = {name: kind << _KIND_SHIFT | _INSIDE for kind, name in enumerate(COLLECTIVE_KINDS)}


@dataclass(frozen=True, slots=True)
class RankBeat:
    """Where one rank was at its last sign of life.

    Attributes:
        rank: which one.
        time_ns: monotonic nanoseconds of the last sign; 0 when there was none.
        epoch: its worker group.
        step: number of the last step that it has begun; `NO_STEP` before the first.
        phase: what it is at.
        layer: the layer that it is in; `BEFORE_LAYERS` or `AFTER_LAYERS` outside of them.
        collective: number of the last collective that it has entered; the first is 1, and 0 is none.
        kind: name of that collective.
        inside: whether it has not come out of it.
        pid: its process; 0 before it has been started.
        done_bytes, total_bytes: how far it has loaded; the total is 0 while unknown.
        host: node rank of the other host that it runs on; 0: it runs on this one.
        remote_state: the state letter of its process when that host last told it; see `state`.
    """

    rank: int
    time_ns: int = 0
    epoch: int = 0
    step: int = NO_STEP
    phase: Phase = Phase.SPAWN
    layer: int = BEFORE_LAYERS
    collective: int = 0
    kind: str = ""
    inside: bool = False
    pid: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    host: int = 0
    remote_state: str = ""

    @property
    def state(self) -> str:
        """The state letter of its process, as in proc(5), looked up now; "" when it is not there."""
        if self.host:
            return self.remote_state
        return process_state(self.pid) if self.pid else ""


class HeartbeatWriter:
    """The line of one rank, for that rank."""

    __slots__ = ("_map", "_words")

    def __init__(self, words: memoryview, mapped: BeatMap | None = None) -> None:
        """Use `open` or `detached`."""
        self._words = words
        self._map = mapped

    @classmethod
    def open(cls, path: str | Path, rank: int, epoch: int = 0) -> HeartbeatWriter:
        """Open the line of `rank` in the file at `path` and sign it with this process's id.

        Raises:
            TransportError: the file is missing, is no heartbeat file of this version, or has no such rank.
        """
        mapped = BeatMap(path, writable=True)
        if not 0 <= rank < mapped.world_size:
            mapped.close()
            raise TransportError(
                f"{path}: a heartbeat of rank {rank}; expected a rank from 0 to {mapped.world_size - 1}, as"
                " many as the file was made for"
            )
        writer = cls(mapped.line(RANK_LINE + rank), mapped)
        writer._begin(epoch)
        return writer

    @classmethod
    def detached(cls) -> HeartbeatWriter:
        """Return a writer that nobody reads, for a rank that has no file to write to."""
        writer = cls(memoryview(bytearray(LINE_BYTES)).cast("q"))
        writer._begin(0)
        return writer

    def _begin(self, epoch: int) -> None:
        words = self._words
        words[_EPOCH], words[_STEP], words[_LAYER] = epoch, NO_STEP, BEFORE_LAYERS
        words[_TIME_NS] = monotonic_ns()
        # The signature last: it says that the other words are there.
        words[_PID] = os.getpid()

    @property
    def phase(self) -> Phase:
        """The phase that was set last."""
        return Phase(self._words[_PHASE])  # type: ignore[call-arg]

    def set_phase(self, phase: Phase) -> None:
        """Note what the rank is at from now on."""
        self._words[_PHASE] = phase
        self._words[_TIME_NS] = monotonic_ns()

    def begin_step(self, step: int, phase: Phase) -> None:
        """Note that step number `step` begins, a `PREFILL` or a `DECODE`."""
        self._words[_STEP] = step
        self._words[_LAYER] = BEFORE_LAYERS
        self.set_phase(phase)

    def enter_layer(self, layer: int) -> None:
        """Note that layer number `layer` begins."""
        words = self._words
        words[_LAYER] = layer
        words[_TIME_NS] = monotonic_ns()

    def leave_layers(self) -> None:
        """Note that the last layer is done."""
        self.enter_layer(AFTER_LAYERS)

    def enter_collective(self, number: int, name: str) -> None:
        """Note that collective number `number`, an `all_reduce` for instance, begins."""
        words = self._words
        words[_COLLECTIVE] = number << _NUMBER_SHIFT | _KIND_BITS[name]
        words[_TIME_NS] = monotonic_ns()

    def leave_collective(self) -> None:
        """Note that the collective is done."""
        words = self._words
        words[_COLLECTIVE] &= ~_INSIDE
        words[_TIME_NS] = monotonic_ns()

    def on_progress(self, done_bytes: int, total_bytes: int) -> None:
        """Note how much has been loaded so far, of how much."""
        self._words[_DONE] = done_bytes
        self._words[_TOTAL] = total_bytes
        self._words[_TIME_NS] = monotonic_ns()

    def close(self) -> None:
        """Let go of the file; idempotent, and nothing can be noted afterwards."""
        self._words.release()
        if self._map is not None:
            self._map.close()


def announce_process(path: str | Path, rank: int, pid: int, epoch: int) -> None:
    """Note the process of a rank that has just been started, and may never come to note anything itself.

    Raises:
        TransportError: the file is missing, or is no heartbeat file of this version.
    """
    mapped = BeatMap(path, writable=True)
    words = mapped.line(RANK_LINE + rank)
    if not words[_PID]:
        words[_EPOCH], words[_STEP], words[_LAYER] = epoch, NO_STEP, BEFORE_LAYERS
        words[_TIME_NS] = monotonic_ns()
        words[_PID] = pid
    words.release()
    mapped.close()


class HeartbeatReader:
    """The lines of all ranks, for anyone.

    Attributes:
        world_size: number of ranks.
    """

    def __init__(self, mapped: BeatMap) -> None:
        """Use `open`."""
        self.world_size = mapped.world_size
        self._map = mapped
        self._lines = [mapped.line(RANK_LINE + rank) for rank in range(mapped.world_size)]

    @classmethod
    def open(cls, path: str | Path) -> HeartbeatReader:
        """Open the file at `path`.

        Raises:
            TransportError: the file is missing, or is no heartbeat file of this version.
        """
        return cls(BeatMap(path))

    def read(self) -> list[RankBeat]:
        """Return where every rank is, in rank order."""
        return [_read_beat(rank, words) for rank, words in enumerate(self._lines)]

    def last_change_ns(self) -> int:
        """Return when any rank has last given a sign, in monotonic nanoseconds; 0 when none has."""
        return max(words[_TIME_NS] for words in self._lines)

    def close(self) -> None:
        """Let go of the file; idempotent."""
        for words in self._lines:
            words.release()
        self._map.close()


def _read_beat(rank: int, words: memoryview) -> RankBeat:
    if not words[_PID]:
        return RankBeat(rank)
    collective = words[_COLLECTIVE]
    # The clock first: whatever comes in afterwards makes the rank look older than it is, never younger.
    return RankBeat(
        rank=rank,
        time_ns=words[_TIME_NS],
        epoch=words[_EPOCH],
        step=words[_STEP],
        phase=Phase(words[_PHASE]),  # type: ignore[call-arg]
        layer=words[_LAYER],
        collective=collective >> _NUMBER_SHIFT,
        kind=COLLECTIVE_KINDS[collective >> _KIND_SHIFT & _KIND_MASK],
        inside=bool(collective & _INSIDE),
        pid=words[_PID],
        done_bytes=words[_DONE],
        total_bytes=words[_TOTAL],
        host=words[HOST_WORD],
        remote_state=chr(words[STATE_WORD]) if words[STATE_WORD] else "",
    )
