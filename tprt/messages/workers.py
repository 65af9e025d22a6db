"""What is said of worker groups: ranks to coordinator, and coordinator to supervisor and back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A rank to the coordinator, on the control lane: weights are loaded and KV blocks allocated."""

    epoch: int
    rank: int
    num_blocks: int
    weight_bytes: int
    kv_bytes: int
    load_s: float


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """A rank to the coordinator, on the control lane, at any time: it cannot go on."""

    epoch: int
    rank: int
    phase: str
    error: str
    traceback: str


@dataclass(frozen=True, slots=True)
class StartGroup:
    """Coordinator to supervisor: start the ranks of a new epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class GroupReady:
    """Coordinator to supervisor: every rank of the epoch is ready; from now on its end need not be the end."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EndGroup:
    """Coordinator to supervisor: kill the ranks of the epoch, which failed of `cause`; see `GroupEnded`."""

    epoch: int
    cause: str


@dataclass(frozen=True, slots=True)
class GroupEnded:
    """Supervisor to coordinator: every process of the epoch is gone.

    Attributes:
        epoch: the worker group.
        cause: what came first, with traceback and last log lines.
        kind: a `CauseKind` of the coordinator's.
        is_input_error: nothing but the user can put it right.
        is_from_outside: a signal that nobody in the group raises by itself.
    """

    epoch: int
    cause: str
    kind: int
    is_input_error: bool
    is_from_outside: bool
