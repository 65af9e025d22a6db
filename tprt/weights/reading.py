"""Carrying out a read plan: a few threads read, one thread takes what the ranks of the host share.

Bounded: a thread holds one chunk, and the exchange its slots. The first error of any thread ends all of them.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from tprt.weights.exchange import LoadExchange, Patience
from tprt.weights.file_reader import FileReader, ReadResult, buffer_bytes
from tprt.weights.placement import Placement
from tprt.weights.read_plan import Chunk, ReadPlan

_NUM_READERS = 4
_Task = tuple[Chunk, int | None]


class _StoppedError(Exception):
    """Another thread has failed."""


class Reading:
    """One rank's reading of one plan.

    Attributes:
        own_read_bytes, shared_read_bytes, cached_bytes: as in `LoadReport`.
    """

    def __init__(self, plan: ReadPlan, placement: Placement, exchange: LoadExchange | None) -> None:
        self.own_read_bytes = 0
        self.shared_read_bytes = 0
        self.cached_bytes = 0
        self._plan = plan
        self._placement = placement
        self._exchange = exchange
        self._files: dict[Path, FileReader] = {}
        self._tasks = self._make_tasks()
        self._lock = threading.Lock()
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
                self._files[file] = reader = FileReader(file)
                stack.callback(reader.close)
            threads = [
                threading.Thread(target=self._guard, args=(self._read_tasks,), name=f"tprt-load-{number}")
                for number in range(_NUM_READERS)
            ]
            for thread in threads:
                thread.start()
            if self._exchange is not None:
                self._guard(self._take_shared)
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _make_tasks(self) -> Iterator[_Task]:
        """Yield what this rank reads, in the order of the files; with a number what it reads for all ranks."""
        tasks: list[_Task] = [(chunk, None) for chunk in self._plan.own]
        for number, chunk in enumerate(self._plan.shared):
            if self._exchange is None:
                tasks.append((chunk, None))
            elif self._exchange.is_mine(number):
                tasks.append((chunk, number))
        return iter(sorted(tasks, key=lambda task: (str(task[0].file), task[0].start)))

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - the outermost frame of a thread; `run` raises it
            with self._lock:
                self._error = self._error or error

    def _read_tasks(self) -> None:
        buffer = _landing_buffer(self._plan.largest_chunk_bytes)
        while True:
            with self._lock:
                task = next(self._tasks, None)
            if task is None or self._error is not None:
                return
            chunk, number = task
            if number is None:
                self._read_own(chunk, buffer)
            else:
                self._read_for_all(chunk, number)

    def _read_own(self, chunk: Chunk, buffer: Tensor) -> None:
        file = self._files[chunk.file]
        if file.is_cached(chunk.start, chunk.stop):
            self._count(chunk, ReadResult(0, chunk.num_bytes, chunk.num_bytes))
            self._place_mapped(chunk)
            return
        result = file.read(_memory_of(buffer), chunk.start, chunk.stop)
        self._count(chunk, result)
        self._place(chunk, buffer[result.start :])

    def _read_for_all(self, chunk: Chunk, number: int) -> None:
        exchange = self._exchange
        assert exchange is not None
        patience = Patience(exchange.timeout_s)
        while not exchange.is_free(number):
            self._stop_if_failed()
            patience.wait(exchange.describe_slowest(number))
        file = self._files[chunk.file]
        if file.is_cached(chunk.start, chunk.stop):
            self._count(chunk, ReadResult(0, chunk.num_bytes, chunk.num_bytes))
            exchange.publish(number, None)
            return
        result = file.read(exchange.slot(number), chunk.start, chunk.stop)
        self._count(chunk, result)
        exchange.publish(number, result.start)

    def _take_shared(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        for number, chunk in enumerate(self._plan.shared):
            patience = Patience(exchange.timeout_s)
            while not exchange.is_published(number):
                self._stop_if_failed()
                reader = number % exchange.world_size
                patience.wait(f"rank {reader} has not read chunk {number} of {chunk.file.name}")
            start = exchange.start_of(number)
            if start is None:
                self._place_mapped(chunk)
            else:
                self._place(chunk, torch.frombuffer(exchange.slot(number), dtype=torch.uint8)[start:])
            exchange.take(number)

    def _place_mapped(self, chunk: Chunk) -> None:
        mapping, start = self._files[chunk.file].map(chunk.start, chunk.stop)
        self._place(chunk, _bytes_of(mapping)[start:])

    def _place(self, chunk: Chunk, raw: Tensor) -> None:
        for piece in chunk.pieces:
            self._placement.put(piece, raw[piece.start - chunk.start : piece.stop - chunk.start])
        self._on_progress()

    def _count(self, chunk: Chunk, result: ReadResult) -> None:
        with self._lock:
            if chunk.pieces[0].match.part.shared:
                self.shared_read_bytes += result.read_bytes
            else:
                self.own_read_bytes += result.read_bytes
            self.cached_bytes += result.cached_bytes

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
