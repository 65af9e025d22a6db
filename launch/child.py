"""The outermost frame of every child process, and the names of what it finds in its environment.

Knows nothing of what the child does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from launch.failure import write_failure
from tprt.log import get_logger

EPOCH = "TPRT_EPOCH"
# Number of its replica, where there are several.
REPLICA = "TPRT_REPLICA"
SUPERVISOR_FD = "TPRT_SUPERVISOR_FD"
LISTENER_FD = "TPRT_LISTENER_FD"
API_KEYS = "TPRT_API_KEYS"
# Name of the run directory in which ranks that torchrun has started look for their environment.
MEETING = "TPRT_MEETING"
# For a deployment over several hosts, besides MASTER_ADDR and MASTER_PORT, where the ranks' store listens.
HOSTS_FD = "TPRT_HOSTS_FD"
HOSTS_SECRET = "TPRT_HOSTS_SECRET"
STEPS_FD = "TPRT_STEPS_FD"
STEPS_ADDRESS = "TPRT_STEPS_ADDRESS"
STEPS_TOKEN = "TPRT_STEPS_TOKEN"
STORE_FD = "TPRT_STORE_FD"


def log_name(name: str) -> str:
    """Return the name of this process in the log: with that of its replica, where there are several."""
    number = os.environ.get(REPLICA)
    return name if number is None else f"replica {number} {name}"


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
