"""Cleans up however this program ends, short of SIGKILL: at its normal exit, after an error, on SIGTERM.

SIGTERM and SIGHUP would end it at once, and nobody would be left to clean up. While there is something to clean
up they therefore leave the program as Ctrl-C does, with the exit code that a shell gives for them. A program
that handles or ignores them by itself is left alone. Knows nothing of what is cleaned up.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import ClassVar, NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_Handler = Callable[[int, FrameType | None], NoReturn] | signal.Handlers


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


class ProgramEnd:
    """Calls `clean_up` at the end of the program, unless released before."""

    # A signal's handler belongs to the whole process: the first guard sets it, the last one takes it back.
    _guards: ClassVar[set[ProgramEnd]] = set()

    def __init__(self, clean_up: Callable[[], None]) -> None:
        self._clean_up = clean_up
        self._pid = os.getpid()

    def guard(self) -> None:
        """Begin to watch for the end."""
        self._guards.add(self)
        atexit.register(self._at_exit)
        _replace_handlers(signal.SIG_DFL, _leave)

    def release(self) -> None:
        """Stop watching, since there is nothing to clean up any more; idempotent."""
        self._guards.discard(self)
        atexit.unregister(self._at_exit)
        if not self._guards:
            _replace_handlers(_leave, signal.SIG_DFL)

    def _at_exit(self) -> None:
        # A forked copy of this process has nothing to end.
        if os.getpid() == self._pid:
            self._clean_up()


def _replace_handlers(old: _Handler, new: _Handler) -> None:
    # Python lets only its main thread set handlers.
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) == old:
            signal.signal(number, new)
