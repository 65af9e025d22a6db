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

from launch.parent_death import PARENT_PID, die_with_parent

EXIT_RAISED = 70
# How long the end of children is waited for at most.
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


def end_child(pid: int) -> None:
    """Kill a child and wait for its end, but not for ever: a process inside a driver may not be killable."""
    end_children([pid])


def end_children(pids: Sequence[int]) -> None:
    """Kill children and wait for their end as `end_child` does, at the same time: a context takes its time."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _REAP_S
    for pid in pids:
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
