"""Lets a process show where its Python code is: asked by a signal, and when a fatal signal ends it.

The dump is made by C code in the handler of the signal, so it also comes from a process whose main thread never
gets back to Python. Knows nothing of who asks.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path

from launch.run_dir import stack_path
from tprt.transport.peer_process import DUMP_SIGNAL


def install_stack_dumps(run_dir: Path, name: str) -> None:
    """From now on, append this process's stacks to `stack_path(run_dir, name)` on `DUMP_SIGNAL` and on a crash.

    Call it before anything slow is imported. A process without it is ended by `DUMP_SIGNAL`. Whoever starts it
    removes what a process of this name has left in an earlier epoch.
    """
    # faulthandler keeps the file open.
    file = stack_path(run_dir, name).open("ab", buffering=0)
    faulthandler.enable(file, all_threads=True)
    faulthandler.register(DUMP_SIGNAL, file, all_threads=True, chain=False)
