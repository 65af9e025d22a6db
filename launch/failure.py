"""What a process says before it dies of an error, and what a death says about the cause.

A record is a small JSON file in the run directory, written before the process lets go of anything that its
peers could notice; so the true cause is on disk before its consequences begin.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tprt.coordinator.cause import Cause, CauseKind
from tprt.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    PeerLostError,
    ShardPlanError,
    TprtError,
    UnsupportedModelError,
)
from tprt.transport.heartbeat import Phase

# What the user can put right; any other error is a failure of the engine.
INPUT_ERRORS = (ConfigError, CheckpointError, UnsupportedModelError, ShardPlanError, InvalidRequestError)
# No process of ours raises them by itself.
_SIGNALS_FROM_OUTSIDE = frozenset(
    {
        signal.SIGKILL,
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
)

_PHASES_OF_A_STEP = (Phase.PREFILL.words, Phase.DECODE.words)


class ReportedCauseError(TprtError):
    """Ends a process that only passes on what has failed elsewhere: on another host."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.text)
        self.cause = cause


class FailureRecord(BaseModel):
    """One process's account of its own failure.

    `secondary` marks a failure that only says that another process is gone, `is_conclusion` the coordinator's
    last word, which has the cause in it. `explains_itself` marks one whose message is written for the user, so
    that it needs no traceback, and `is_input_error` one that nobody but the user can put right. `reported_kind`
    and `is_from_outside` are those of a cause that the process only passes on.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    host: str
    device: str
    pid: int
    phase: str
    error: str
    traceback: str
    time_ns: int
    secondary: bool
    is_conclusion: bool
    explains_itself: bool
    is_input_error: bool
    reported_kind: int | None = None
    is_from_outside: bool = False

    @property
    def message(self) -> str:
        """The error without the name of its type."""
        return self.error.partition(": ")[2]


@dataclass(frozen=True, slots=True)
class Death:
    """An unexpected end of a child.

    Attributes:
        name, pid: which one.
        exit_code: how it ended (negative: by that signal); None if it is about to, as its record says, or if
            it was not started here.
        record: what it has left, if anything.
        phase: what it was at, as others could see it; empty if nobody could.
        step: the step that it had begun last.
        log: its last lines.
        stack: its Python stacks at the moment of a crash.
        is_out_of_memory: the kernel has killed a process for want of memory meanwhile.
    """

    name: str
    pid: int
    exit_code: int | None
    record: FailureRecord | None
    phase: str = ""
    step: int = -1
    log: tuple[str, ...] = ()
    stack: str = ""
    is_out_of_memory: bool = False


def write_failure(run_dir: Path, name: str, phase: str, error: BaseException) -> None:
    """Leave the record of `error` for the supervisor, in one atomic step; where it has gone, for nobody."""
    reported = error.cause if isinstance(error, ReportedCauseError) else None
    record = FailureRecord(
        name=name,
        host=socket.gethostname(),
        device=_device(),
        pid=os.getpid(),
        phase=phase,
        error=f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
        time_ns=time.monotonic_ns(),
        secondary=isinstance(error, PeerLostError | EngineDeadError),
        is_conclusion=isinstance(error, EngineDeadError),
        explains_itself=isinstance(error, TprtError),
        is_input_error=isinstance(error, INPUT_ERRORS) if reported is None else reported.is_input_error,
        reported_kind=None if reported is None else reported.kind,
        is_from_outside=reported is not None and reported.is_from_outside,
    )
    path = _path(run_dir, name)
    draft = path.with_suffix(".draft")
    with contextlib.suppress(FileNotFoundError):
        draft.write_text(record.model_dump_json(), encoding="utf-8")
        draft.rename(path)


def read_failure(run_dir: Path, name: str) -> FailureRecord | None:
    """Return the record that process `name` left, if any."""
    try:
        return FailureRecord.model_validate_json(_path(run_dir, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def forget_failures(run_dir: Path, names: Iterable[str]) -> None:
    """Remove what earlier processes of these names have left, so that nobody is blamed for it."""
    for name in names:
        _path(run_dir, name).unlink(missing_ok=True)


def cause_of(death: Death) -> Cause:
    """Return what `death` says about the cause."""
    record, text = death.record, describe(death)
    if record is None:
        is_signal = -(death.exit_code or 0) in _SIGNALS_FROM_OUTSIDE
        return Cause(
            CauseKind.SILENT_DEATH, text, is_from_outside=is_signal and not _was_killed_for_memory(death)
        )
    if record.reported_kind is not None:
        kind = CauseKind(record.reported_kind)
        return Cause(kind, text, record.time_ns, record.is_input_error, record.is_from_outside)
    kind = CauseKind.CONSEQUENCE if record.secondary else CauseKind.OWN_ERROR
    if record.is_conclusion:
        kind = CauseKind.OBSERVED
    return Cause(kind, text, record.time_ns, record.is_input_error)


def describe(death: Death) -> str:
    """Say who died where of what; log and traceback first, so that the last line holds the gist."""
    record = death.record
    if record is None:
        phase = f" in phase {death.phase}{_step(death)}" if death.phase else ""
        memory = "; the kernel was short of memory at that time" if _was_killed_for_memory(death) else ""
        words = f"{_exit_words(death.exit_code)}{phase}{memory}"
        return f"{_evidence(death)}{death.name} (pid {death.pid}) {words}"
    if record.is_conclusion or record.reported_kind is not None:
        return record.message
    if record.explains_itself and not record.secondary:
        return f"{death.name}: {record.message}"
    places = (f"host {record.host}", record.device, _step(death).lstrip(", "), f"pid {record.pid}")
    where = f"{death.name} ({', '.join(filter(None, places))}) failed in phase {record.phase}"
    return f"{_evidence(death)}{record.traceback}{where}: {record.error}"


def _evidence(death: Death) -> str:
    log = "".join(f"  {line}\n" for line in death.log)
    title = f"last lines of the log of {death.name}:\n" if log else ""
    stack = f"{death.stack.rstrip()}\n" if death.stack.strip() else ""
    return f"{title}{log}{stack}"


def _was_killed_for_memory(death: Death) -> bool:
    return death.is_out_of_memory and death.exit_code == -signal.SIGKILL


def _step(death: Death) -> str:
    phase = death.record.phase if death.record else death.phase
    return f", step {death.step}" if phase in _PHASES_OF_A_STEP else ""


def _exit_words(exit_code: int | None) -> str:
    if exit_code is None:
        return "has ended without a report"
    if exit_code < 0:
        known = -exit_code in {number.value for number in signal.Signals}
        return f"was killed by {signal.Signals(-exit_code).name if known else f'signal {-exit_code}'}"
    return f"ended unexpectedly with exit code {exit_code}"


def _device() -> str:
    """Return the device that this process computes on, as far as it has come to have one."""
    # It may have failed half-way through the import of torch.
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not hasattr(cuda, "is_initialized"):
        return ""
    with contextlib.suppress(RuntimeError):
        return f"cuda:{cuda.current_device()}" if cuda.is_initialized() else "cpu"
    return ""


def _path(run_dir: Path, name: str) -> Path:
    return run_dir / f"failure-{name.replace(' ', '-')}.json"
