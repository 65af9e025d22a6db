"""Sums over CUDA devices by NCCL's library, called by ctypes from one process. Knows nothing of verdicts."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

_NAME = "libnccl.so.2"
# Where the packages nvidia-nccl-cu* put it, from which torch takes it before any other.
_IN_PACKAGES = Path("nvidia/nccl/lib") / _NAME
# ncclUint32 and ncclSum of nccl.h
_UINT32, _SUM = 3, 0


class NcclError(RuntimeError):
    """A call of NCCL failed: its name, and what NCCL says of it."""


class NcclMissingError(RuntimeError):
    """There is no library of NCCL: a torch that needs none has it built in."""


class Nccl:
    """NCCL as torch will load it."""

    def __init__(self) -> None:
        """Load it.

        Raises:
            NcclMissingError: it is not there.
        """
        packages = [Path(folder) / _IN_PACKAGES for folder in sys.path]
        path = next((str(file) for file in packages if file.exists()), _NAME)
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise NcclMissingError(str(error)) from error
        for name in ("ncclGetErrorString", "ncclGetLastError"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def version(self) -> str:
        """Return its version, such as 2.27.5."""
        found = ctypes.c_int()
        self._call("ncclGetVersion", ctypes.byref(found))
        return f"{found.value // 10000}.{found.value // 100 % 100}.{found.value % 100}"

    def meet(self, indices: Sequence[int]) -> list[ctypes.c_void_p]:
        """Return a communicator for each of these devices."""
        size = len(indices)
        communicators = (ctypes.c_void_p * size)()
        self._call("ncclCommInitAll", communicators, size, (ctypes.c_int * size)(*indices))
        return [ctypes.c_void_p(one) for one in communicators]

    def sum(
        self, communicators: Sequence[ctypes.c_void_p], addresses: Sequence[ctypes.c_uint64], num_elements: int
    ) -> None:
        """Begin to sum 32-bit integers at the address of each device, in place, on its default stream."""
        self._call("ncclGroupStart")
        for communicator, address in zip(communicators, addresses, strict=True):
            count = ctypes.c_size_t(num_elements)
            self._call("ncclAllReduce", address, address, count, _UINT32, _SUM, communicator, None)
        self._call("ncclGroupEnd")

    def part(self, communicators: Sequence[ctypes.c_void_p]) -> None:
        """Give back what the communicators hold."""
        for communicator in communicators:
            self._call("ncclCommDestroy", communicator)

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._library, name)(*arguments):
            said = [self._library.ncclGetErrorString(code), self._library.ncclGetLastError(None)]
            texts = [text.decode(errors="replace").strip() for text in said if text]
            raise NcclError(f"{name}: {': '.join(texts)}")
