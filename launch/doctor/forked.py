"""Children of a check: forked ones, which have torch imported already, and programs. All die with the check.

CUDA cannot be used on both sides of a fork: whoever forks leaves it alone. Knows nothing of checks.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from typing import TypeVar

from launch.parent_death import PARENT_PID, die_with_parent

EXIT_RAISED = 70
Answer = TypeVar("Answer")
_REAP_S = 0.5


def fork_child(body: Callable[[], None]) -> int:
    """Run `body` in a forked process, which dies with this one, and return its pid.

    It never returns into the caller's frames. `body` handles its errors; one that it does not ends the child
    with EXIT_RAISED.
    """
    sys.stdout.flush()
    os.environ[PARENT_PID] = str(os.getpid())
    pid = os.fork()
    if pid:
        return pid
    code = EXIT_RAISED
    try:
        die_with_parent()
        body()
        code = 0
    finally:
        os._exit(code)


def ask_child(function: Callable[[], Answer], timeout_s: float) -> Answer | None:
    """Return what `function` returns in a process of its own; None if it gave nothing in `timeout_s`."""
    receiver, sender = Pipe(duplex=False)
    with receiver:
        with sender:
            pid = fork_child(lambda: sender.send(function()))
        answer: Answer | None = None
        with contextlib.suppress(EOFError):
            answer = receiver.recv() if receiver.poll(timeout_s) else None
    end_child(pid)
    return answer


def end_child(pid: int) -> None:
    """Kill a child and wait for its end, but not for ever: a process inside a driver may not be killable."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _REAP_S
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline_s:
            select.select([], [], [], 0.005)


def output_of(command: Sequence[str], timeout_s: float) -> str:
    """Run a program to its end and return what it prints.

    Raises:
        FileNotFoundError: there is no such program.
        subprocess.TimeoutExpired: it did not end in `timeout_s`, and was killed.
        subprocess.CalledProcessError: it ended with another exit code than 0.
    """
    os.environ[PARENT_PID] = str(os.getpid())
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=True,
        preexec_fn=die_with_parent,
    ).stdout
