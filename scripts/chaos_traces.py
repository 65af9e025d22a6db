"""What a deployment says and what it leaves behind: lines, processes, shared memory.

Its processes are known by a variable in their environment, which children inherit whatever becomes of their
parents. Knows nothing of faults.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

MARK = "TPRT_CHAOS_CELL"
_SHARED = Path("/dev/shm")


class Lines:
    """The lines of a pipe, each with the time when it came."""

    def __init__(self, pipe: IO[str]) -> None:
        self.found: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.found.append((time.monotonic(), line.rstrip("\n")))

    def finish(self) -> None:
        """Wait a moment for the last lines."""
        self._thread.join(2.0)

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(line for _, line in self.found)


def living(mark: str) -> dict[int, str]:
    """Return pid and command of every process that carries `mark` and has not ended."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            # It may end at any moment, and that of another user cannot be read.
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = _command(folder)
    return found


def wait_until_gone(mark: str, timeout_s: float) -> dict[int, str]:
    """Wait until no process carries `mark`; return those that still do after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while (left := living(mark)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return left


def kill_all(mark: str) -> None:
    """Kill whatever carries `mark`."""
    for pid in living(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until_gone(mark, 5.0)


def shared_memory() -> set[str]:
    """Return the names in /dev/shm."""
    return set(os.listdir(_SHARED))


def new_shared_memory(before: Iterable[str]) -> list[str]:
    """Return the names in /dev/shm that are not in `before` and that no process has mapped or open."""
    added = shared_memory() - set(before)
    return sorted(added - _used_by_anyone() if added else added)


def _used_by_anyone() -> set[str]:
    names = set()
    prefix = f"{_SHARED}/"
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            maps = (folder / "maps").read_text(errors="replace").splitlines()
            targets = [line.partition(prefix)[2] for line in maps if prefix in line]
            targets += [os.readlink(fd).partition(prefix)[2] for fd in (folder / "fd").iterdir()]
            names |= {target.removesuffix(" (deleted)") for target in targets}
    return names


def _command(folder: Path) -> str:
    words = (folder / "cmdline").read_bytes().split(b"\0")
    return b" ".join(words[-3:]).decode(errors="replace").strip()
