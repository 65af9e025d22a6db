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
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from launch.parent_death import PARENT_PID, die_with_parent
from tprt.errors import TprtError

EXIT_RAISED = 70
Answer = TypeVar("Answer")
REAP_S = 0.5
"""How long the end of children is waited for at most."""


class NoAnswerError(RuntimeError):
    """Nothing came from a child in its time."""


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
    (answer,) = ask_children([function], timeout_s)
    return None if isinstance(answer, Exception) else answer


def ask_children(
    functions: Sequence[Callable[[], Answer]], timeout_s: float
) -> list[Answer | TprtError | RuntimeError]:
    """Return what each of `functions` returns in a process of its own, all of them side by side.

    In the place of an answer is the error that was raised (a RuntimeError if it is none of ours), or one that
    says that the process died or, a NoAnswerError, that nothing came in `timeout_s`.
    """
    receivers: list[Connection] = []
    pids: list[int] = []
    try:
        for function in functions:
            receiver, sender = Pipe(duplex=False)
            receivers.append(receiver)
            with sender:
                pids.append(fork_child(partial(_answer, function, sender)))
        end_s = time.monotonic() + timeout_s
        return [_take_answer(receiver, timeout_s, end_s) for receiver in receivers]
    finally:
        end_children(pids)
        for receiver in receivers:
            receiver.close()


def _answer(function: Callable[[], object], sender: Connection) -> None:
    try:
        answer = function()
    except TprtError as error:
        answer = error
    except Exception as error:  # noqa: BLE001 - the outermost frame
        answer = RuntimeError(str(error) or type(error).__name__)
    sender.send(answer)


def _take_answer(receiver: Connection, timeout_s: float, end_s: float) -> Any:
    try:
        if receiver.poll(max(0.0, end_s - time.monotonic())):
            return receiver.recv()
    except EOFError:
        return RuntimeError("the process died")
    return NoAnswerError(f"no answer came in {timeout_s:.1f} s")


def end_child(pid: int) -> None:
    """Kill a child and wait for its end, but not for ever: a process inside a driver may not be killable."""
    end_children([pid])


def end_children(pids: Sequence[int]) -> None:
    """Kill children and wait for their end as `end_child` does, at the same time: a context takes its time."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + REAP_S
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
