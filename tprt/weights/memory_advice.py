"""What the kernel can be asked and told about pages: which of a file are cached, which will be written.

Both are hints: where the kernel does not know or does not want to say, nothing fails. Knows nothing of
checkpoints.
"""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

# Linux 6.5 and later; the same number on every architecture.
_SYS_CACHESTAT = 451
# Linux 5.14 and later; before, pages come when they are hit.
_MADV_POPULATE_WRITE = 23
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("nr_cache", "nr_dirty", "nr_writeback", "nr_evicted", "nr_recently_evicted")
    )


def cached_bytes(fd: int, start: int, num_bytes: int) -> int | None:
    """Return how many of a file's bytes, in whole pages, are in the page cache; None where nobody tells.

    By cachestat(2), which looks and brings nothing in.
    """
    asked, told = _Range(start, num_bytes), _CacheStat()
    if _LIBC.syscall(_SYS_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(told), 0) != 0:
        return None
    return int(told.nr_cache) * mmap.PAGESIZE


def populate(tensor: Tensor) -> None:
    """Have the kernel put memory behind a contiguous CPU tensor at once, not page by page as it is hit."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    stop = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_POPULATE_WRITE)
