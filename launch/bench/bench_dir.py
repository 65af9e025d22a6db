"""The folder where the processes of a benchmark meet.

Knows nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from launch.program_end import ProgramEnd
from launch.run_dir import trial_dir


@contextmanager
def bench_dir() -> Iterator[str]:
    """Make a folder whose path is short enough for sockets, and remove it at the end, on SIGTERM as well.

    Raises:
        ConfigError: no writable place was found.
    """
    # SIGTERM leaves as Ctrl-C does, with everything ended.
    end = ProgramEnd(lambda: None)
    end.guard()
    try:
        with trial_dir() as folder:
            yield str(folder)
    finally:
        end.release()
