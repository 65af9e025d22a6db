"""Putting what was read into parameters, with an account of every row, so that each is written exactly once.

On a GPU a piece is gathered into pinned memory and copied from there while the next one is read; a type that
differs is converted on the device. Knows nothing of files.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from tprt.errors import CheckpointError
from tprt.sharding import Range
from tprt.weights.matching import Match
from tprt.weights.memory_advice import populate
from tprt.weights.read_plan import CHUNK_BYTES, Piece, wanted_rows

_WORDS = {2: torch.int16, 4: torch.int32}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NUM_STAGING_BUFFERS = 2
# Torch converts a type on all cores, whoever asks.
_NUM_CONVERTERS = 2


class Placement:
    """The parameters of one rank while they are filled; threads may share it."""

    def __init__(self) -> None:
        self.placed_bytes = 0
        self._rows: dict[Match, list[Range]] = defaultdict(list)
        self._lock = threading.Lock()
        self._converters = threading.Semaphore(_NUM_CONVERTERS)
        self._local = threading.local()
        self._copiers: list[_DeviceCopier] = []

    def put(self, piece: Piece, raw: Tensor) -> None:
        """Copy what this rank keeps of `piece`, whose bytes are `raw` (uint8), into its parameter."""
        match, part, rows = piece.match, piece.match.part, _kept_rows(piece)
        if rows.size <= 0:
            return
        source = _typed(raw, _DTYPES[match.entry.dtype]).view(piece.rows.size, *match.entry.shape[1:])
        source = source.narrow(0, rows.start - piece.rows.start, rows.size)
        if part.dim != 0:
            source = source.narrow(part.dim, part.source.start, part.source.size)
        self._copy(_place_of(match, rows), source)
        self._account(piece, rows)

    def takes_directly(self, pieces: Iterable[Piece]) -> bool:
        """Tell whether all these pieces lie in their parameters as they do in the file."""
        return all(_lies_as_in_file(piece) for piece in pieces)

    def put_directly(self, piece: Piece, fill: Callable[[memoryview], None]) -> None:
        """Have the parameter's own memory filled with the bytes of a piece that `takes_directly` is true of."""
        place = _place_of(piece.match, piece.rows)
        populate(place)
        fill(memoryview(place.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        self._account(piece, piece.rows)

    def _account(self, piece: Piece, rows: Range) -> None:
        with self._lock:
            self._rows[piece.match].append(rows)
            self.placed_bytes += piece.kept_bytes

    def finish(self, matches: Collection[Match]) -> None:
        """Wait for copies under way and check the account.

        Raises:
            CheckpointError: an element was not written exactly once, which is an error of ours.
        """
        for copier in self._copiers:
            copier.synchronize()
        parts: dict[nn.Parameter, list[Range]] = defaultdict(list)
        for match in matches:
            if not _tiles(self._rows[match], wanted_rows(match)):
                raise _unaccounted(match.entry.name, "rows", wanted_rows(match), self._rows[match])
            part = match.part
            parts[match.parameter].append(Range(part.dest, part.dest + part.source.size))
        for match in matches:
            whole = Range(0, match.parameter.shape[match.part.dim])
            if not _tiles(parts[match.parameter], whole):
                raise _unaccounted(match.entry.name, "its parameter's parts", whole, parts[match.parameter])

    def _copy(self, dest: Tensor, source: Tensor) -> None:
        if dest.device.type != "cuda":
            if dest.is_contiguous():
                populate(dest)
            if dest.dtype == source.dtype:
                _copy_on_this_core(dest, source)
                return
            with self._converters:
                dest.copy_(source)
            return
        copier = getattr(self._local, "copier", None)
        if copier is None:
            copier = self._local.copier = _DeviceCopier(dest.device)
            with self._lock:
                self._copiers.append(copier)
        copier.copy(dest, source)


def _lies_as_in_file(piece: Piece) -> bool:
    match, place = piece.match, piece.match.parameter.data
    is_copy = place.device.type == "cpu" and place.dtype == _DTYPES[match.entry.dtype]
    return is_copy and match.part.dim == 0 and piece.rows == _kept_rows(piece)


def _kept_rows(piece: Piece) -> Range:
    """Return which of a piece's rows this rank keeps something of; none if the size is not above 0."""
    wanted = wanted_rows(piece.match)
    return Range(max(piece.rows.start, wanted.start), min(piece.rows.stop, wanted.stop))


def _place_of(match: Match, rows: Range) -> Tensor:
    """Return where rows of the whole tensor go in the parameter."""
    part, whole = match.part, match.parameter.data
    if part.dim == 0:
        return whole.narrow(0, part.dest + rows.start - part.source.start, rows.size)
    return whole.narrow(part.dim, part.dest, part.source.size).narrow(0, rows.start, rows.size)


def _tiles(ranges: Iterable[Range], whole: Range) -> bool:
    """Whether `ranges` cover `whole` without overlap."""
    end = whole.start
    for part in sorted(ranges, key=lambda part: part.start):
        if part.start != end:
            return False
        end = part.stop
    return end == whole.stop


def _unaccounted(name: str, what: str, expected: Range, found: list[Range]) -> CheckpointError:
    return CheckpointError(
        f"{name}: {what} {expected.start} to {expected.stop} were to be written once each; written were"
        f" {[(part.start, part.stop) for part in found]}: please report this"
    )


class _DeviceCopier:
    """One thread's way to a GPU: a stream, and pinned buffers that take turns."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * _NUM_STAGING_BUFFERS
        self._free = [_event() for _ in self._buffers]
        self._turn = 0

    def copy(self, dest: Tensor, source: Tensor) -> None:
        """Copy `source`, of any layout, to `dest`; `source` may be changed afterwards."""
        turn = self._turn
        self._turn = (turn + 1) % len(self._buffers)
        self._free[turn].synchronize()
        staged = self._staging(turn, source)
        _copy_on_this_core(staged, source)
        with torch.cuda.stream(self._stream):
            arrived = staged.to(dest.device, non_blocking=True) if staged.dtype != dest.dtype else staged
            dest.copy_(arrived, non_blocking=True)
            self._free[turn].record(self._stream)

    def synchronize(self) -> None:
        """Wait until everything has arrived."""
        self._stream.synchronize()

    def _staging(self, turn: int, source: Tensor) -> Tensor:
        num_bytes = source.numel() * source.element_size()
        if len(self._buffers[turn]) < num_bytes:
            size = max(num_bytes, CHUNK_BYTES)
            self._buffers[turn] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._buffers[turn][:num_bytes].view(source.dtype).view(source.shape)


def _copy_on_this_core(dest: Tensor, source: Tensor) -> None:
    """Copy between CPU tensors of one type; torch would wake all cores for each of many threads that copy."""
    words = _WORDS[dest.element_size()]
    np.copyto(dest.view(words).numpy(), source.view(words).numpy())


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """View bytes as `dtype`; headers of an odd length put tensors where only a copy can be viewed so."""
    aligned = raw.data_ptr() % dtype.itemsize == 0 and raw.storage_offset() % dtype.itemsize == 0
    return (raw if aligned else raw.clone()).view(dtype)
