"""What a process says before it dies of an error, and which of several deaths came first.

A record is a small JSON file in the run directory, written before the process lets go of anything that its
peers could notice; so the true cause is on disk before its consequences begin.
"""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tprt.errors import EngineDeadError, PeerLostError, TprtError


class FailureRecord(BaseModel):
    """One process's account of its own failure.

    `secondary` marks a failure that only says that another process is gone. `is_input_error` marks one whose
    message is written for the user, so that it needs no traceback.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    host: str
    pid: int
    phase: str
    error: str
    traceback: str
    time_ns: int
    secondary: bool
    is_input_error: bool


@dataclass(frozen=True, slots=True)
class Death:
    """An unexpected end of a child: its exit code (negative: a signal) and its record, if it left one."""

    name: str
    pid: int
    exit_code: int
    record: FailureRecord | None


def write_failure(run_dir: Path, name: str, phase: str, error: BaseException) -> None:
    """Leave the record of `error` for the supervisor, in one atomic step."""
    record = FailureRecord(
        name=name,
        host=socket.gethostname(),
        pid=os.getpid(),
        phase=phase,
        error=f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
        time_ns=time.monotonic_ns(),
        secondary=isinstance(error, PeerLostError | EngineDeadError),
        is_input_error=isinstance(error, TprtError),
    )
    path = _path(run_dir, name)
    draft = path.with_suffix(".draft")
    draft.write_text(record.model_dump_json(), encoding="utf-8")
    draft.rename(path)


def read_failure(run_dir: Path, name: str) -> FailureRecord | None:
    """Return the record that process `name` left, if any."""
    try:
        return FailureRecord.model_validate_json(_path(run_dir, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def first_cause(deaths: Sequence[Death]) -> Death:
    """Return the death that the others follow from.

    A process's own error comes before a death without a word (a signal), and that before those that only
    report the loss of another process; among equals the earlier one.
    """

    def order(death: Death) -> tuple[int, int]:
        if death.record is None:
            return 1, 0
        return (2 if death.record.secondary else 0), death.record.time_ns

    return min(deaths, key=order)


def describe(death: Death) -> str:
    """Say who died where of what; the traceback first, so that the last line holds the gist."""
    record = death.record
    if record is None:
        return f"{death.name} (pid {death.pid}) {_exit_words(death.exit_code)}"
    if record.is_input_error and not record.secondary:
        return f"{death.name}: {record.error.partition(': ')[2]}"
    where = f"{death.name} (host {record.host}, pid {record.pid}) failed in phase {record.phase}"
    return f"{record.traceback}{where}: {record.error}"


def _exit_words(exit_code: int) -> str:
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended unexpectedly with exit code {exit_code}"


def _path(run_dir: Path, name: str) -> Path:
    return run_dir / f"failure-{name.replace(' ', '-')}.json"
