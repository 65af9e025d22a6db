"""A child dies with its parent. Imports next to nothing, so that a child can call it before anything else.

The kernel sends a signal when the thread that started the child ends (PR_SET_PDEATHSIG), and a parent that was
gone before that could be asked for is noticed by its pid. Knows nothing of what the child does.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
from types import FrameType

PARENT_PID = "TPRT_PARENT_PID"
RUN_DIR = "TPRT_RUN_DIR"
_PR_SET_PDEATHSIG = 1
_ENDING_S = 0.5
_LOOK_S = 0.005


def die_with_parent() -> None:
    """Ask the kernel to kill this process with its parent; leave at once if that one is gone already."""
    _ask_for(signal.SIGKILL)
    if _is_orphan():
        os._exit(1)


def clean_up_after_parent() -> None:
    """Remove the run directory when the parent has ended without doing so, and leave.

    For one child alone. The signal is SIGTERM, since nothing can be done on SIGKILL; one that comes while the
    parent is there ends this process as it always does.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    _ask_for(signal.SIGTERM)
    if _is_orphan():
        _remove_run_dir_and_leave()


def _ask_for(number: signal.Signals) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def _is_orphan() -> bool:
    parent = os.environ.get(PARENT_PID)
    return parent is not None and os.getppid() != int(parent)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    # The signal of a parent's death comes while the last of its threads is still ending.
    deadline_s = time.monotonic() + _ENDING_S
    while time.monotonic() < deadline_s:
        if _is_orphan():
            _remove_run_dir_and_leave()
        time.sleep(_LOOK_S)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _remove_run_dir_and_leave() -> None:
    # The ranks die at the same moment; what one of them makes just then is removed by the second try.
    for _ in range(2):
        shutil.rmtree(os.environ[RUN_DIR], ignore_errors=True)
    os._exit(1)
