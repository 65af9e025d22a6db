"""A child dies with its parent. Imports next to nothing, so that a child can call it before anything else.

The kernel sends a signal when the thread that started the child ends (PR_SET_PDEATHSIG), and a parent that was
gone before that could be asked for is noticed by its pid. Knows nothing of what the child does.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import threading
import time

from launch.job_signals import reach_all_processes

PARENT_PID = "TPRT_PARENT_PID"
RUN_DIR = "TPRT_RUN_DIR"
# The folder of the whole deployment, where it has several replicas with a RUN_DIR each.
DEPLOYMENT_DIR = "TPRT_DEPLOYMENT_DIR"
_PR_SET_PDEATHSIG = 1
_TRIES = 50
_BETWEEN_TRIES_S = 0.01


def die_with_parent() -> None:
    """Ask the kernel to kill this process with its parent; leave at once if that one is gone already."""
    _ask_for(signal.SIGKILL)
    if _is_orphan():
        os._exit(1)


def clean_up_after_parent() -> None:
    """Remove the run directory when the parent has ended without doing so, and leave.

    For one child alone, before it starts threads. The signal is SIGTERM, since nothing can be done on SIGKILL;
    one that somebody else sends ends this process as it always does, but where the parent gets it too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_sigterm, name="tprt-parent-death", daemon=True).start()
    _ask_for(signal.SIGTERM)
    if _is_orphan():
        _remove_run_dir_and_leave()


def remove_run_dir() -> None:
    """Remove what the processes of this deployment shared; for the last of them that uses it.

    One of several replicas removes its own folder, and the last of them that of the deployment.
    """
    _remove(os.environ[RUN_DIR])
    whole = os.environ.get(DEPLOYMENT_DIR)
    if whole is not None and not _has_folders(whole):
        _remove(whole)


def _remove(folder: str) -> None:
    # What another thread or a dying rank makes just then is removed by the next try.
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(_BETWEEN_TRIES_S)


def _has_folders(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_dir() for entry in entries)
    except FileNotFoundError:
        return False


def _ask_for(number: signal.Signals) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def _is_orphan() -> bool:
    parent = os.environ.get(PARENT_PID)
    return parent is not None and os.getppid() != int(parent)


def _wait_for_sigterm() -> None:
    # The parent's pid is in the signal of its death, which comes while it is still taken apart: a core dump may
    # keep it there for seconds.
    while str(signal.sigwaitinfo({signal.SIGTERM}).si_pid) != os.environ.get(PARENT_PID):
        if not reach_all_processes():
            _end_by_sigterm()
    _remove_run_dir_and_leave()


def _end_by_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


def _remove_run_dir_and_leave() -> None:
    remove_run_dir()
    os._exit(1)
