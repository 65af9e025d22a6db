"""Lines of heartbeats on their way from one host's file to another's, where their clock is that of the reader.

A relayed line has the node rank of its host and the state of its process, which nobody can look up elsewhere.
Knows nothing of how a line travels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from time import monotonic_ns

from tprt.errors import TransportError
from tprt.transport.heartbeat import HOST_WORD, PID_WORD, STATE_WORD, TIME_WORD
from tprt.transport.heartbeat_file import RANK_LINE, BeatMap
from tprt.transport.peer_process import process_state

_NUM_WORDS = HOST_WORD
_INT64 = 2**63


class BeatExporter:
    """Reads the lines of this host's ranks."""

    def __init__(self, path: str | Path, ranks: Iterable[int]) -> None:
        """Map the file at `path`.

        Raises:
            TransportError: it is missing, or is no heartbeat file of this version.
        """
        self._map = BeatMap(path)
        self._lines = {rank: self._map.line(RANK_LINE + rank) for rank in ranks}

    def export(self) -> list[list[int]]:
        """Return a row for each rank: its number, its words with its age in place of the time, its state."""
        now_ns = monotonic_ns()
        return [self._row(rank, list(words[:_NUM_WORDS]), now_ns) for rank, words in self._lines.items()]

    def close(self) -> None:
        """Let go of the file; idempotent."""
        for words in self._lines.values():
            words.release()
        self._map.close()

    @staticmethod
    def _row(rank: int, words: list[int], now_ns: int) -> list[int]:
        words[TIME_WORD] = max(0, now_ns - words[TIME_WORD])
        state = process_state(words[PID_WORD]) if words[PID_WORD] else ""
        return [rank, *words, ord(state) if state else 0]


class BeatImporter:
    """Writes the lines of other hosts' ranks."""

    def __init__(self, path: str | Path) -> None:
        """Map the file at `path`.

        Raises:
            TransportError: it is missing, or is no heartbeat file of this version.
        """
        self._map = BeatMap(path, writable=True)

    def write(self, host: int, ranks: Iterable[int], rows: Iterable[list[int]]) -> None:
        """Note what `host` has exported of its `ranks`.

        Raises:
            TransportError: a row is none, or is of another rank.
        """
        expected = set(ranks)
        for row in rows:
            if len(row) != _NUM_WORDS + 2 or row[0] not in expected or not all(map(_is_word, row)):
                raise TransportError(f"a heartbeat {row}; expected one of ranks {sorted(expected)}")
            rank, *exported, state = row
            if not exported[PID_WORD]:
                continue
            exported[TIME_WORD] = monotonic_ns() - exported[TIME_WORD]
            words = self._map.line(RANK_LINE + rank)
            words[HOST_WORD], words[STATE_WORD] = host, state
            for at, word in enumerate(exported):
                words[at] = word
            words.release()

    def close(self) -> None:
        """Let go of the file; idempotent."""
        self._map.close()


def _is_word(value: object) -> bool:
    return type(value) is int and -_INT64 <= value < _INT64
