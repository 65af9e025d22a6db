"""Which bytes of which files a rank reads, and what becomes of them: made from headers, before any is read.

A column shard is one run of rows, hence of bytes, that only this rank wants. Tensors that every rank wants a
part of (row shards, norms, replicated heads) are cut into chunks of whole rows that all ranks number alike, so
that each chunk is read by one rank of a host and handed to the others. Knows nothing of reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tprt.sharding import Range
from tprt.weights.matching import Match

CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Consecutive rows of one tensor, as they lie in the file.

    Attributes:
        match: the tensor and its place in the model.
        rows: rows of the whole tensor; this rank may keep some of them, or some columns, or nothing.
        start, stop: its first byte in the file, and the one after its last.
        kept_bytes: how many of its bytes this rank keeps.
    """

    match: Match
    rows: Range
    start: int
    stop: int
    kept_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Consecutive bytes of one file, read at once."""

    file: Path
    pieces: tuple[Piece, ...]

    @property
    def start(self) -> int:
        """Its first byte in the file."""
        return self.pieces[0].start

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.pieces[-1].stop

    @property
    def num_bytes(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """All chunks of one rank, each list in the order of the files.

    Attributes:
        own: what only this rank needs.
        shared: what every rank of the host goes through; the same list, chunk by chunk, on all of them.
    """

    own: tuple[Chunk, ...]
    shared: tuple[Chunk, ...]

    @property
    def largest_chunk_bytes(self) -> int:
        """Size of the largest chunk."""
        return max((chunk.num_bytes for chunk in (*self.own, *self.shared)), default=0)


def make_read_plan(matches: Iterable[Match], chunk_bytes: int = CHUNK_BYTES) -> ReadPlan:
    """Cut what `matches` need into chunks of at most `chunk_bytes`, or of one row where that is more."""
    own: list[Piece] = []
    shared: list[Piece] = []
    for match in matches:
        # A row that fits no chunk fits no slot that ranks share: each reads the whole tensor for itself.
        if match.part.shared and row_bytes(match) <= chunk_bytes:
            shared += _cut(match, Range(0, _num_rows(match)), chunk_bytes)
        else:
            own += _cut(match, wanted_rows(match), chunk_bytes)
    return ReadPlan(tuple(_join(own, chunk_bytes)), tuple(_join(shared, chunk_bytes)))


def wanted_rows(match: Match) -> Range:
    """Return the rows of the tensor of which this rank keeps something."""
    return match.part.source if match.part.dim == 0 else Range(0, _num_rows(match))


def row_bytes(match: Match) -> int:
    """Return the bytes of one row, an index of the first dimension, in the file."""
    return match.entry.num_bytes // max(1, _num_rows(match))


def _num_rows(match: Match) -> int:
    return match.entry.shape[0]


def _cut(match: Match, rows: Range, chunk_bytes: int) -> Iterator[Piece]:
    step = max(1, chunk_bytes // max(1, row_bytes(match)))
    # Equal pieces, rather than a small one at the end.
    step = math.ceil(rows.size / math.ceil(rows.size / step)) if rows.size else 1
    first, size, wanted = match.entry.offset, row_bytes(match), wanted_rows(match)
    kept_of_row = size
    if match.part.dim != 0:
        kept_of_row = size * match.part.source.size // match.part.full_shape[match.part.dim]
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        kept = max(0, min(stop, wanted.stop) - max(start, wanted.start)) * kept_of_row
        yield Piece(match, Range(start, stop), first + start * size, first + stop * size, kept)


def _join(pieces: list[Piece], chunk_bytes: int) -> Iterator[Chunk]:
    """Put neighbours in a file into one chunk while they fit."""
    pieces = sorted(pieces, key=lambda piece: (str(piece.match.entry.file), piece.start))
    open_: list[Piece] = []
    for piece in pieces:
        if open_ and not _may_join(open_, piece, chunk_bytes):
            yield Chunk(open_[0].match.entry.file, tuple(open_))
            open_ = []
        open_.append(piece)
    if open_:
        yield Chunk(open_[0].match.entry.file, tuple(open_))


def _may_join(open_: list[Piece], piece: Piece, chunk_bytes: int) -> bool:
    return (
        open_[0].match.entry.file == piece.match.entry.file
        and open_[0].match.part.shared == piece.match.part.shared
        and open_[-1].stop == piece.start
        and piece.stop - open_[0].start <= chunk_bytes
    )
