"""Starting the processes of a benchmark out of the reach of Ctrl-C, which is for the one that started them.

Knows nothing of what they do.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from multiprocessing.process import BaseProcess


def start_out_of_reach(processes: Sequence[BaseProcess]) -> None:
    """Start processes that Ctrl-C in a terminal never reaches, not even in their first instant."""
    # A mask passes to the child.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
