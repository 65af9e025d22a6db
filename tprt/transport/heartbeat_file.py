"""The file of the heartbeats: its lines, how it is made, and how a process maps it.

    header line         magic, version, number of ranks
    coordinator line    see `tprt.transport.coordinator_beat`
    rank lines          one for each rank, see `tprt.transport.heartbeat`

A line is 128 bytes, two cache lines, which x86-64 fetches in pairs; so nobody's stores disturb another's. Each
field is a word of 8 bytes with one writer, stored whole, in some tens of nanoseconds.

Knows nothing of what the words of a line mean.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path

from tprt.errors import TransportError

LINE_BYTES = 128
COORDINATOR_LINE = 1
RANK_LINE = 2
"""The line of rank 0; those of the others follow."""

_LINE_WORDS = LINE_BYTES // 8
_HEADER = struct.Struct("<QQQ")
_MAGIC = int.from_bytes(b"tprtbeat", "little")
_VERSION = 1
_MAX_RANKS = 65536


class BeatMap:
    """A heartbeat file in the address space of this process."""

    def __init__(self, path: str | Path, writable: bool = False) -> None:
        """Map the file at `path`, to look at it or to write as well.

        Raises:
            TransportError: it is missing, or is no heartbeat file of this version.
        """
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(
                f"{path}: no heartbeats ({error.strerror}); `create_heartbeats` makes the file before any rank"
                " starts"
            ) from error
        try:
            self.world_size = _check_header(path, fd)
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._data = mmap.mmap(fd, _file_bytes(self.world_size), access=access)
        finally:
            os.close(fd)
        self._words = memoryview(self._data).cast("q")

    def line(self, number: int) -> memoryview:
        """Return the words of line `number`; release it before `close`."""
        return self._words[number * _LINE_WORDS : (number + 1) * _LINE_WORDS]

    def close(self) -> None:
        """Unmap the file; idempotent."""
        self._words.release()
        self._data.close()


def create_heartbeats(path: str | Path, world_size: int) -> None:
    """Make the file for `world_size` ranks, in one atomic step; whatever was there is replaced.

    A folder in memory serves best: on a disk, a store may now and then wait for the disk to take the page.

    Raises:
        TransportError: the number of ranks is out of range, or the file cannot be written.
    """
    if not 1 <= world_size <= _MAX_RANKS:
        raise TransportError(f"heartbeats of {world_size} ranks; expected 1 to {_MAX_RANKS}")
    header = _HEADER.pack(_MAGIC, _VERSION, world_size)
    draft = Path(f"{path}.draft")
    try:
        # Written out, not left as a hole: a store into a hole of a full file system is a SIGBUS.
        draft.write_bytes(header.ljust(_file_bytes(world_size), b"\0"))
        draft.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise TransportError(
            f"{path}: heartbeats cannot be written: {error.strerror}; a few KiB are needed there"
        ) from error


def _file_bytes(world_size: int) -> int:
    return (RANK_LINE + world_size) * LINE_BYTES


def _check_header(path: str | Path, fd: int) -> int:
    """Return the number of ranks that the file says it has."""
    magic, version, world_size = _HEADER.unpack(os.pread(fd, _HEADER.size, 0).ljust(_HEADER.size, b"\0"))
    if (magic, version) != (_MAGIC, _VERSION):
        raise TransportError(
            f"{path}: magic {magic:#x} and version {version}; expected heartbeats of version {_VERSION}: use"
            " one version of tprt for all processes of a deployment"
        )
    size = os.fstat(fd).st_size
    if not 1 <= world_size <= _MAX_RANKS or size != _file_bytes(world_size):
        raise TransportError(f"{path}: {size} bytes for {world_size} ranks; the file is damaged")
    return int(world_size)
