"""Files that processes leave when they are killed: what NCCL has in /dev/shm until all ranks have opened it.

Knows nothing of why they are killed.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_PREFIX = "/dev/shm/nccl-"
_DELETED = " (deleted)"


@contextlib.contextmanager
def removing_files_of(pids: Iterable[int]) -> Iterator[None]:
    """Note what these processes have there, and remove it after the block, which ends them."""
    is_there = bool(glob.glob(f"{_PREFIX}*"))
    files = {file for pid in pids for file in _files_of(pid)} if is_there else set()
    try:
        yield
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                os.unlink(file)


def members_of(group: int) -> list[int]:
    """Return the processes of a process group."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(ProcessLookupError):
            if name.isdecimal() and os.getpgid(int(name)) == group:
                found.append(int(name))
    return found


def _files_of(pid: int) -> list[str]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = [_PREFIX + line.partition(_PREFIX)[2] for line in lines if _PREFIX in line]
    return [path for path in paths if not path.endswith(_DELETED)]
