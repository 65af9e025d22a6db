"""What the children write to standard error: passed on to this process's own, and the last lines of each kept.

A child's output may go to a file as well, or to that alone.

Nothing here waits. Standard error that nobody reads (a full pipe, a terminal that is held) holds up neither the
children nor whoever watches them: what does not fit into a bounded backlog is left out, and that is said.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

STDERR = 2
# A pipe that is ready for writing takes this much without waiting (PIPE_BUF, pipe(7)).
_WRITE_BYTES = 4096
_READ_BYTES = 65536
# Of one child at a time: a pipe holds one of these reads, so this is more than a dead process can have left.
_MAX_READS = 16
_MAX_BACKLOG_BYTES = 1024 * 1024
_NUM_LAST_LINES = 20
_MAX_LINE_BYTES = 1000
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class LogSink:
    """Where the output of one child goes: to the end of a file, if there is one, and on if `is_shown`."""

    path: Path | None = None
    is_shown: bool = True


SHOWN = LogSink()


class LogTee:
    """Passes on bytes to a descriptor as it takes them."""

    def __init__(self, fd: int = STDERR) -> None:
        self._fd = fd
        self._backlog = bytearray()
        self._num_left_out = 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    @property
    def has_backlog(self) -> bool:
        """Tell whether something waits until the descriptor takes it."""
        return bool(self._backlog)

    def feed(self, data: bytes) -> None:
        """Pass on `data`, now or later, unless too much waits already."""
        if len(self._backlog) + len(data) > _MAX_BACKLOG_BYTES:
            self._num_left_out += len(data)
            return
        if self._num_left_out:
            self._backlog += b"\n[%d bytes of log left out: standard error was not read]\n" % self._num_left_out
            self._num_left_out = 0
        self._backlog += data
        self.flush()

    def flush(self) -> None:
        """Write as much as the descriptor takes without waiting."""
        try:
            while self._backlog and self._poll.poll(0):
                written = os.write(self._fd, self._backlog[:_WRITE_BYTES])
                del self._backlog[:written]
        except OSError:
            # Nobody will ever read it.
            self._backlog.clear()

    def drain(self, timeout_s: float) -> None:
        """Wait until nothing waits any more, `timeout_s` at most."""
        deadline_s = time.monotonic() + timeout_s
        while self._backlog and (left_s := deadline_s - time.monotonic()) > 0:
            self._poll.poll(left_s * 1000)
            self.flush()


class ChildLog:
    """The reading end of one child's output."""

    def __init__(self, fd: int, tee: LogTee, sink: LogSink = SHOWN) -> None:
        """Take the descriptor over.

        Raises:
            OSError: the file of the sink cannot be opened.
        """
        os.set_blocking(fd, False)
        self._fd = fd
        self._tee = tee
        self._is_shown = sink.is_shown
        self._file = -1 if sink.path is None else os.open(sink.path, _APPEND, 0o644)
        self._lines: deque[bytes] = deque(maxlen=_NUM_LAST_LINES)
        self._rest = b""

    def fileno(self) -> int:
        """The descriptor; -1 once nothing more can come."""
        return self._fd

    def last_lines(self) -> list[str]:
        """Return the last lines that came, the oldest first."""
        lines = [*self._lines, self._rest] if self._rest.strip() else list(self._lines)
        return [line.decode("utf-8", "replace") for line in lines[-_NUM_LAST_LINES:]]

    def read(self) -> None:
        """Take in what has come."""
        for _ in range(_MAX_READS):
            try:
                data = os.read(self._fd, _READ_BYTES) if self._fd >= 0 else b""
            except BlockingIOError:
                return
            if not data:
                self.close()
                return
            if self._is_shown:
                self._tee.feed(data)
            self._keep(data)
            self._write(data)

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        for fd in (self._fd, self._file):
            if fd >= 0:
                os.close(fd)
        self._fd = self._file = -1

    def _write(self, data: bytes) -> None:
        # A full disk must not end a deployment; what it had no room for is missing in the file.
        with contextlib.suppress(OSError):
            if self._file >= 0:
                os.write(self._file, data)

    def _keep(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        # What a progress bar has written over is not worth a line.
        self._lines += [line.rstrip(b"\r").rpartition(b"\r")[2][:_MAX_LINE_BYTES] for line in lines]
        self._rest = rest[-_MAX_LINE_BYTES:]
