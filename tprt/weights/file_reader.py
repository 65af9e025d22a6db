"""Byte ranges of one file, by the way that is fastest for where they are.

What is in the page cache is mapped or copied from there. What is not is read through it, with the kernel's
read-ahead: what one rank has read ahead the others of its host need, and a restart finds all of it. Where they
do not, it is read past the cache (O_DIRECT), so that a rank reads from the disk what it asks for and nothing
ahead of it; a file system that cannot do that is read through the cache without read-ahead. Knows nothing of
tensors.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tprt.errors import CheckpointError
from tprt.weights.memory_advice import cached_bytes

# What O_DIRECT wants of offsets, lengths and addresses, on every device that is in use.
ALIGNMENT = 4096
# One system call reads this much at most: a chunk. Smaller ones keep the disk less busy.
_READ_BYTES = 4 * 2**20
# A range of which this share is cached goes through the cache.
_CACHED_SHARE = 0.9
_MADV_POPULATE_READ = 22


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What one read did.

    Attributes:
        start: where the wanted bytes begin in the buffer.
        read_bytes: how many bytes were asked of the file system.
    """

    start: int
    read_bytes: int


def buffer_bytes(num_bytes: int) -> int:
    """Return the size of a buffer into which any range of `num_bytes` can be read."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT


class FileReader:
    """One file, open for reading; threads may share it."""

    def __init__(self, file: Path, past_cache: bool) -> None:
        """Open `file`; `past_cache` says that what is near what is read will not be needed on this host.

        Raises:
            CheckpointError: it cannot be opened.
        """
        self._file = file
        self._direct_fd = -1
        self._direct_works = False
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None
        try:
            self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be opened: {error.strerror}") from error
        if not past_cache:
            return
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        with contextlib.suppress(OSError):
            self._direct_fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            self._direct_works = True

    def close(self) -> None:
        """Close the file."""
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1

    def is_cached(self, start: int, stop: int) -> bool:
        """Whether bytes `start` to `stop` are (nearly) all in the page cache, as far as the kernel tells."""
        cached = cached_bytes(self._fd, start, stop - start)
        return cached is not None and cached >= (stop - start) * _CACHED_SHARE

    @contextmanager
    def mapped(self, start: int, stop: int) -> Iterator[memoryview]:
        """Give access to bytes `start` to `stop`, which are cached, without copying them.

        The file is mapped once, since to map and unmap stops all threads of the process each time; what was
        used is let go of, so that it does not count as this process's memory.
        """
        with self._lock:
            if self._mapping is None:
                self._mapping = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(OSError):  # before Linux 5.14
            self._mapping.madvise(_MADV_POPULATE_READ, first, stop - first)
        yield memoryview(self._mapping)[start:stop]
        self._mapping.madvise(mmap.MADV_DONTNEED, first, stop - first)

    def copy(self, dest: memoryview, start: int) -> None:
        """Fill `dest` with the bytes from `start` on by way of the cache.

        Raises:
            CheckpointError: as `read` does.
        """
        self._fill(dest, start)

    def read(self, buffer: memoryview, start: int, stop: int) -> ReadResult:
        """Read bytes `start` to `stop`, which are not cached, into `buffer`, which begins at an `ALIGNMENT`.

        It has at least `buffer_bytes(stop - start)` bytes.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than it was.
        """
        if self._direct_works:
            first = start // ALIGNMENT * ALIGNMENT
            length = -(-(stop - first) // ALIGNMENT) * ALIGNMENT
            self._direct_works = self._try_direct(buffer[:length], first, stop - first)
            if self._direct_works:
                return ReadResult(start - first, length)
        self._fill(buffer[: stop - start], start)
        return ReadResult(0, stop - start)

    def _try_direct(self, buffer: memoryview, offset: int, needed: int) -> bool:
        """Read past the page cache; False where this file system refuses to."""
        done = 0
        while done < needed:
            try:
                count = os.preadv(self._direct_fd, [buffer[done : done + _READ_BYTES]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return False
                raise self._unreadable(error) from error
            if count == 0:
                raise self._too_short(offset + done)
            done += count
            if done < needed and count % ALIGNMENT:
                # Only the end of a file is not whole; the cached way finds out what has become of this one.
                return False
        return True

    def _fill(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done : done + _READ_BYTES]], offset + done)
            except OSError as error:
                raise self._unreadable(error) from error
            if count == 0:
                raise self._too_short(offset + done)
            done += count

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self._file} cannot be read: {error.strerror}")

    def _too_short(self, end: int) -> CheckpointError:
        return CheckpointError(f"{self._file} ended at byte {end} while it was read; was it replaced or cut?")
