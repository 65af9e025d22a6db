"""What one process can learn about another of this host from outside, without its help.

Knows nothing of what the process is for.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

DUMP_SIGNAL = signal.SIGUSR2
"""Asks a process of ours for its Python stacks; it ends a process that does not catch it."""

_DUMP_S = 0.5
_LOOK_S = 0.005
# A dump is many small writes: it is complete when the file has not grown for this many looks.
_QUIET_LOOKS = 5
_MAX_STACK_BYTES = 16_000

_STATE_WORDS = {
    "R": "computes",
    "S": "sleeps",
    "D": "waits in the kernel for a disk or a device",
    "T": "is stopped",
    "t": "is held by a debugger",
    "Z": "has ended",
    "X": "has ended",
}


def process_state(pid: int) -> str:
    """Return the state letter of a process, as in proc(5): R, S, D, T, t or Z; "" when it is not there."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # The name before the state is in brackets, and may hold brackets itself.
    return stat.rpartition(")")[2].split()[0]


def is_gone(state: str) -> bool:
    """Whether a process with this state letter will not do anything any more."""
    return state in ("", "Z", "X")


def is_stopped(state: str) -> bool:
    """Whether a process with this state letter does nothing until it is told to go on."""
    return state in ("T", "t")


def state_words(state: str) -> str:
    """Return a state letter in words that follow "its process"."""
    if not state:
        return "is gone"
    return f"{_STATE_WORDS.get(state, 'is there')} (state {state})"


def request_stack(pid: int, path: Path) -> str:
    """Ask a process for its Python stacks, which it appends to the file at `path`, and return them.

    Waits half a second at most, and not at all for a process that cannot answer: it is stopped or gone, or does
    not catch `DUMP_SIGNAL`. Returns "" when nothing has come.
    """
    state = process_state(pid)
    if is_gone(state) or is_stopped(state) or not _catches_dump_signal(pid):
        return ""
    try:
        start = path.stat().st_size
        os.kill(pid, DUMP_SIGNAL)
    except OSError:
        return ""
    _wait_until_written(path, start)
    with path.open("rb") as file:
        file.seek(start)
        return file.read()[-_MAX_STACK_BYTES:].decode(errors="replace")


def _catches_dump_signal(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (DUMP_SIGNAL - 1) & 1)


def _wait_until_written(path: Path, start: int) -> None:
    deadline_s = time.monotonic() + _DUMP_S
    size, quiet = start, 0
    while quiet < _QUIET_LOOKS and time.monotonic() < deadline_s:
        time.sleep(_LOOK_S)
        grown = path.stat().st_size
        quiet = quiet + 1 if grown == size > start else 0
        size = grown
