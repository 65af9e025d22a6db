"""Carrying out a read plan: threads read and copy, one more takes what the ranks of the host share.

Bounded: a thread holds one chunk, and the exchange its slots. The first error of any thread ends all of them.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tprt.weights.exchange import LoadExchange, Patience
from tprt.weights.file_reader import FileReader, buffer_bytes
from tprt.weights.placement import Placement
from tprt.weights.read_plan import Chunk, Piece, ReadPlan

NUM_READERS = 4
"""How many threads of a rank wait for the disk at a time."""

# So many may take from the page cache, by the cores of a rank; more keep each other from Python's lock.
_LEAST_COPIERS, _MOST_COPIERS = 2, 8
# Between two looks for more to copy, while the shared chunks are being taken.
_LOOK_S = 1e-3


class _StoppedError(Exception):
    """Another thread has failed."""


class Reading:
    """One rank's reading of one plan.

    Attributes:
        own_read_bytes, shared_read_bytes, cached_bytes: as in `LoadReport`.
    """

    def __init__(
        self, plan: ReadPlan, placement: Placement, exchange: LoadExchange | None, past_cache: bool
    ) -> None:
        """Prepare to read; `past_cache` says that this host needs only a part of what is in the files."""
        self.own_read_bytes = 0
        self.shared_read_bytes = 0
        self.cached_bytes = 0
        self._plan = plan
        self._placement = placement
        self._exchange = exchange
        self._past_cache = past_cache
        self._files: dict[Path, FileReader] = {}
        self._own_left = deque(plan.own)
        self._shared_left: deque[tuple[int, Chunk]] = deque()
        if exchange is None:
            self._own_left += plan.shared
        else:
            mine = ((number, chunk) for number, chunk in enumerate(plan.shared) if exchange.is_mine(number))
            self._shared_left += mine
        # Shared chunks that are in the page cache, and whether there may be more of them.
        self._cached_left: deque[Chunk] = deque()
        self._takes_shared = exchange is not None and len(plan.shared) > 0
        self._lock = threading.Lock()
        # What torch may use for one operation is this rank's share of the cores.
        num_copiers = min(_MOST_COPIERS, max(_LEAST_COPIERS, torch.get_num_threads()))
        self._num_threads = max(NUM_READERS, num_copiers)
        self._copiers = threading.Semaphore(num_copiers)
        self._readers = threading.Semaphore(NUM_READERS)
        self._error: BaseException | None = None
        self._on_progress: Callable[[], None] = lambda: None

    def run(self, on_progress: Callable[[], None]) -> None:
        """Read everything; `on_progress` is called from any thread, after each chunk.

        Raises:
            CheckpointError: a file cannot be read.
            TransportTimeoutError: another rank does not do its part.
        """
        self._on_progress = on_progress
        with ExitStack() as stack:
            for file in {chunk.file for chunk in (*self._plan.own, *self._plan.shared)}:
                self._files[file] = reader = FileReader(file, self._past_cache)
                stack.callback(reader.close)
            threads = [
                threading.Thread(target=self._guard, args=(self._read_tasks,), name=f"tprt-load-{number}")
                for number in range(self._num_threads)
            ]
            for thread in threads:
                thread.start()
            if self._exchange is not None:
                self._guard(self._take_shared)
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - the outermost frame of a thread; `run` raises it
            with self._lock:
                self._error = self._error or error

    def _read_tasks(self) -> None:
        """Read what all ranks wait for as soon as there is a slot for it, and between that this rank's own."""
        buffer = _landing_buffer(self._plan.largest_chunk_bytes)
        while self._error is None:
            with self._lock:
                takes_shared = self._takes_shared
                shared, own, cached = self._next_shared(), None, None
                if shared is None and self._own_left:
                    own = self._own_left.popleft()
                elif shared is None and self._cached_left:
                    cached = self._cached_left.popleft()
            if shared is not None:
                self._read_for_all(*shared)
            elif own is not None:
                self._read_own(own, buffer)
            elif cached is not None:
                self._place_cached(cached)
            elif self._shared_left:
                self._wait_for_slot()
            elif takes_shared:
                time.sleep(_LOOK_S)
            else:
                return

    def _next_shared(self) -> tuple[int, Chunk, bool] | None:
        """Return the next chunk that this rank reads for all, if that can be now, and whether it is cached."""
        if not self._shared_left:
            return None
        assert self._exchange is not None
        number, chunk = self._shared_left[0]
        is_cached = self._exchange.may_publish(number) and self._is_cached(chunk)
        if not is_cached and not self._exchange.is_free(number):
            return None
        self._shared_left.popleft()
        return number, chunk, is_cached

    def _wait_for_slot(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        patience = Patience(exchange.timeout_s)
        while (number := self._first_shared()) is not None and not self._cached_left:
            if exchange.is_free(number):
                return
            self._stop_if_failed()
            patience.wait(exchange.describe_slowest(number))

    def _first_shared(self) -> int | None:
        with self._lock:
            return self._shared_left[0][0] if self._shared_left else None

    def _read_own(self, chunk: Chunk, buffer: Tensor) -> None:
        if self._is_cached(chunk):
            self._count(chunk, chunk.num_bytes, cached_bytes=chunk.num_bytes)
            self._place_cached(chunk)
            return
        if not self._past_cache and self._placement.takes_directly(chunk.pieces):
            self._count(chunk, chunk.num_bytes)
            with self._readers:
                self._place_directly(chunk)
            return
        with self._readers:
            result = self._files[chunk.file].read(_memory_of(buffer), chunk.start, chunk.stop)
        self._count(chunk, result.read_bytes)
        self._place(chunk, buffer[result.start :])

    def _read_for_all(self, number: int, chunk: Chunk, is_cached: bool) -> None:
        exchange = self._exchange
        assert exchange is not None
        if is_cached:
            self._count(chunk, chunk.num_bytes, cached_bytes=chunk.num_bytes)
            exchange.publish(number, None)
            return
        with self._readers:
            result = self._files[chunk.file].read(exchange.slot(number), chunk.start, chunk.stop)
        self._count(chunk, result.read_bytes)
        exchange.publish(number, result.start)

    def _take_shared(self) -> None:
        try:
            exchange = self._exchange
            assert exchange is not None
            for number, chunk in enumerate(self._plan.shared):
                if self._is_cached(chunk) or not self._take_from_slot(exchange, number, chunk):
                    self._cached_left.append(chunk)
                exchange.take(number)
        finally:
            self._takes_shared = False

    def _take_from_slot(self, exchange: LoadExchange, number: int, chunk: Chunk) -> bool:
        """Place a chunk that another rank has read; False where it found it in the page cache."""
        patience = Patience(exchange.timeout_s)
        while not exchange.is_published(number):
            self._stop_if_failed()
            reader = number % exchange.world_size
            patience.wait(f"rank {reader} has not read chunk {number} of {chunk.file.name}")
        start = exchange.start_of(number)
        if start is not None:
            self._place(chunk, torch.frombuffer(exchange.slot(number), dtype=torch.uint8)[start:])
        return start is not None

    def _is_cached(self, chunk: Chunk) -> bool:
        return self._files[chunk.file].is_cached(chunk.start, chunk.stop)

    def _place_cached(self, chunk: Chunk) -> None:
        file = self._files[chunk.file]
        for piece in chunk.pieces:
            self._place_cached_piece(file, piece)
        self._on_progress()

    def _place_cached_piece(self, file: FileReader, piece: Piece) -> None:
        with self._copiers:
            if self._placement.takes_directly([piece]):
                self._placement.put_directly(piece, partial(file.copy, start=piece.start))
                return
            with file.mapped(piece.start, piece.stop) as raw:
                self._placement.put(piece, torch.frombuffer(raw, dtype=torch.uint8))

    def _place_directly(self, chunk: Chunk) -> None:
        for piece in chunk.pieces:
            self._placement.put_directly(piece, partial(self._files[chunk.file].copy, start=piece.start))
        self._on_progress()

    def _place(self, chunk: Chunk, raw: Tensor) -> None:
        for piece in chunk.pieces:
            self._placement.put(piece, raw[piece.start - chunk.start : piece.stop - chunk.start])
        self._on_progress()

    def _count(self, chunk: Chunk, read_bytes: int, cached_bytes: int = 0) -> None:
        with self._lock:
            if chunk.pieces[0].match.part.shared:
                self.shared_read_bytes += read_bytes
            else:
                self.own_read_bytes += read_bytes
            self.cached_bytes += cached_bytes

    def _stop_if_failed(self) -> None:
        if self._error is not None:
            raise _StoppedError


def _landing_buffer(chunk_bytes: int) -> Tensor:
    """Return page-aligned memory that a chunk can be read into."""
    return _bytes_of(mmap.mmap(-1, buffer_bytes(chunk_bytes)))


def _memory_of(buffer: Tensor) -> memoryview:
    return memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers


def _bytes_of(mapping: mmap.mmap) -> Tensor:
    """View a mapping, which lives as long as the view."""
    return torch.frombuffer(mapping, dtype=torch.uint8)
