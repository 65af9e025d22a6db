"""In a job of Slurm every process gets the SIGTERM that ends the job, not only those that Slurm has started.

What ends in an order of its own leaves the signal to whoever answers for that order. Slurm kills what does not
end. Imports next to nothing, so that a child can call it before anything else.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# By which the server is asked to finish what it serves, and nobody else is asked for anything.
DRAIN_SIGNAL = signal.SIGUSR1


def reach_all_processes() -> bool:
    """Tell whether a signal for this deployment is sent to all its processes."""
    return "SLURM_JOB_ID" in os.environ


def leave_sigterm_to_parent() -> None:
    """Ignore SIGTERM from now on where the parent gets it too; for children that it ends itself."""
    if reach_all_processes():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def sigterm_left_to_first_host() -> Iterator[None]:
    """Ignore SIGTERM meanwhile where the host of node rank 0, which says when all is over, gets it too."""
    if not reach_all_processes():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
