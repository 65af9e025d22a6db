"""The first and the last frame of every child process.

A child dies with its parent: the kernel sends SIGKILL when the thread that started it ends
(PR_SET_PDEATHSIG), and a parent that was gone before that could be asked for is noticed by its pid. Knows
nothing of what the child does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from launch.failure import write_failure
from tprt.log import get_logger

PARENT_PID = "TPRT_PARENT_PID"
RUN_DIR = "TPRT_RUN_DIR"
EPOCH = "TPRT_EPOCH"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process with its parent; leave at once if that one is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get(PARENT_PID)
    if parent is not None and os.getppid() != int(parent):
        os._exit(1)


def run_child(
    name: str,
    run_dir: Path,
    phase: Callable[[], str],
    body: Callable[[], None],
    report: Callable[[Exception], None] = lambda error: None,
) -> None:
    """Run `body`; an error is recorded before any peer can see it, then reported, and the exit code is 1."""
    try:
        body()
    except Exception as error:  # noqa: BLE001 - the outermost frame
        write_failure(run_dir, name, phase(), error)
        report(error)
        get_logger(__name__).debug("failed in phase %s", phase(), exc_info=error)
        # Not a normal exit: a rank that others wait for could wait for them in its own clean-up.
        sys.stderr.flush()
        os._exit(1)
