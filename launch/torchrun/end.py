"""What there is to say of a signal by which torchrun ends all processes.

It sends one as soon as one of the ranks that it has started is gone, before that is understood here, and kills
those that are still there 30 s later.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from launch.program_end import PutOffEnd
from launch.run_dir import adopts_ranks
from launch.supervisor import Supervisor

# A signal has come to all ranks, and what has failed before is explained.
_SIGNAL_S = 0.3
_EXPLANATION_S = 10.0


def put_off_end(run_dir: Path) -> AbstractContextManager[PutOffEnd | None]:
    """Return what puts a signal off where there may be something to say before it."""
    return PutOffEnd() if adopts_ranks(run_dir) else nullcontext()


def explain_signal(run_dir: Path, supervisor: Supervisor) -> None:
    """Raise the first cause if torchrun has asked this program to end because of a failure.

    Raises:
        EngineDeadError: says what has failed.
    """
    if adopts_ranks(run_dir):
        supervisor.wait_for_failure(_SIGNAL_S)
        if supervisor.has_lost_ranks:
            supervisor.wait_for_failure(_EXPLANATION_S)
        supervisor.raise_if_failed()
