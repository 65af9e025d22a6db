"""What the kernel can be asked and told about pages: which of a file are cached, where large ones help.

Both are hints: where the kernel does not know or does not want to say, nothing fails. Knows nothing of
checkpoints.
"""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

# Linux 6.5 and later; the same number on every architecture.
_SYS_CACHESTAT = 451
_MADV_HUGEPAGE = 14
_SMALLEST_ADVISED_BYTES = 128 * 1024
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


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages behind a CPU tensor that has not been written yet.

    To fill fresh memory in pages of 4 KiB takes three times as long as in pages of 2 MiB, most of it in the
    kernel's fault handler.
    """
    num_bytes = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or num_bytes < _SMALLEST_ADVISED_BYTES:
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    stop = tensor.data_ptr() + num_bytes
    _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_HUGEPAGE)
