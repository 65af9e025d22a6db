"""Cleans up however this program ends, short of SIGKILL: at its normal exit, after an error, on SIGTERM.

SIGTERM and SIGHUP would end it at once, and nobody would be left to clean up. While there is something to
clean up they therefore leave the program as Ctrl-C does, with the exit code that a shell gives for them. Work
that has something to show for itself can put the first of these signals off until it has shown it. A program
that handles or ignores them by itself is left alone. Knows nothing of what is cleaned up.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ClassVar, NoReturn

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


class PutOffEnd:
    """While entered, the first signal that would end the program is only noted; the next one acts at once."""

    def __init__(self) -> None:
        self._replaced: dict[int, Any] = {}
        self._noted: Callable[[], object] | None = None

    @property
    def is_asked(self) -> bool:
        """Tell whether a signal has come."""
        return self._noted is not None

    def catch_up(self) -> None:
        """Let the signal that was put off, if any, do what it would have done.

        Raises:
            KeyboardInterrupt, SystemExit: that.
        """
        if self._noted is not None:
            self._noted()

    def __enter__(self) -> PutOffEnd:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *_SIGNALS):
                if signal.getsignal(number) in (signal.default_int_handler, _leave):
                    self._replaced[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        handler = self._replaced[number]
        self._noted = lambda: handler(number, None)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()
