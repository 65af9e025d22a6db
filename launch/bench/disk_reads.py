"""The state of disk, page cache and memory for benchmarks: bring them into a known one, and ask for it.

Knows nothing of what is in the files.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tprt.errors import CheckpointError
from tprt.weights.memory_advice import cached_bytes

_BLOCK_BYTES = 8 * 2**20
_MOST_SETTLING_PASSES = 4
_SETTLED_RATIO = 1.05


def empty_cache(files: Sequence[Path]) -> None:
    """Drop `files` from the page cache; pages that are mapped or not yet written stay there."""
    for file in files:
        with _opened(file, os.O_RDONLY) as fd:
            # what is dirty is not dropped
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(files: Sequence[Path]) -> None:
    """Bring `files` into the page cache."""
    if cached_share(files) != 1.0:
        read_in_one_stream(files, direct=False)


def cached_share(files: Sequence[Path]) -> float | None:
    """Return which part of `files` is in the page cache, 0 to 1; None where the kernel does not tell."""
    cached = total = 0
    for file in files:
        with _opened(file, os.O_RDONLY) as fd:
            size = os.fstat(fd).st_size
            found = cached_bytes(fd, 0, size)
        if found is None:
            return None
        # whole pages are counted, and the last one is cut
        cached += min(found, size)
        total += size
    return cached / max(1, total)


def read_in_one_stream(files: Sequence[Path], direct: bool) -> float | None:
    """Read `files` from end to end, one after another, in blocks of 8 MiB, into memory that is there already.

    Args:
        direct: past the page cache (O_DIRECT); else through it, with the kernel's read-ahead.

    Returns:
        Seconds; None where the file system cannot read past the page cache.
    """
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    with mmap.mmap(-1, _BLOCK_BYTES) as block:
        block.write(bytes(_BLOCK_BYTES))
        start_s = time.monotonic()
        try:
            for file in files:
                with _opened(file, flags) as fd:
                    _read_all(fd, block)
        except OSError as error:
            if direct and error.errno == errno.EINVAL:
                return None
            raise
        return time.monotonic() - start_s


def settle_disk(files: Sequence[Path]) -> None:
    """Read `files` past the page cache until that takes no longer than the time before.

    Many disks, those of clouds above all, are faster for the first gigabytes after a rest.
    """
    before_s = read_in_one_stream(files, direct=True)
    for _ in range(_MOST_SETTLING_PASSES - 1):
        now_s = read_in_one_stream(files, direct=True)
        if before_s is None or now_s is None or now_s < before_s * _SETTLED_RATIO:
            return
        before_s = now_s


def settle_memory(num_bytes: int) -> None:
    """Touch as much memory as is about to be filled, and free it.

    A virtual machine gives memory that is free for some seconds back to its host, and to touch it again costs
    up to seconds a gigabyte: of whatever comes next, and not of how it works.
    """
    with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, num_bytes, mmap.PAGESIZE):
            memory[start] = 1


def disk_bytes_read() -> int | None:
    """Return the bytes that this process has made the kernel fetch from disks; None where it does not count.

    Pages that it found in the page cache are not in it, pages that were read ahead for it are.
    """
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    return int(fields["read_bytes"])


def reset_peak_memory() -> None:
    """Let `peak_memory_bytes` begin anew from what this process has now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Return the most resident memory since `reset_peak_memory`, with mapped pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def _opened(file: Path, flags: int) -> Iterator[int]:
    try:
        fd = os.open(file, flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise
        raise CheckpointError(f"{file} cannot be opened: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _read_all(fd: int, block: mmap.mmap) -> None:
    offset = 0
    while count := os.preadv(fd, [block], offset):
        offset += count
        if count % mmap.PAGESIZE:
            # the end of the file, and no offset from which O_DIRECT could go on
            return
