"""The cells of the chaos matrix, and what must come of each: which end, which words.

Knows nothing of how a fault is inflicted and how a deployment is started.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from tprt.transport.heartbeat import Phase

STALL_TIMEOUT_S = 2.0
# Of a process that is stopped where nobody looks for progress: the deadlines that are left.
STEP_TIMEOUT_S = 10.0
STARTUP_TIMEOUT_S = 30.0
SHUTDOWN_GRACE_S = 1.0
_IMPORT_S = 2.0
# Nothing is to be noticed where the supervisor ends in order: interpreters that hold torch take a while to go.
_ORDERLY_END_S = 3.0
EXIT_CODE = 7
MESSAGE = "injected by chaos"


class Fault(StrEnum):
    """What is done to a process."""

    SIGKILL = "SIGKILL"
    SIGSEGV = "SIGSEGV"
    SIGSTOP = "SIGSTOP"
    SIGTERM = "SIGTERM"
    EXCEPTION = "exception"
    MEMORY_ERROR = "MemoryError"
    EXIT = "os._exit"
    SKIP = "skipped collective"


class Victim(StrEnum):
    """The process that it is done to."""

    SUPERVISOR = "supervisor"
    COORDINATOR = "coordinator"
    RANK_0 = "rank 0"
    RANK_1 = "rank 1"


RANKS = (Victim.RANK_0, Victim.RANK_1)
PHASES = tuple(phase for phase in Phase if phase is not Phase.START)
_SERVING = (Phase.PREFILL, Phase.DECODE, Phase.IDLE)
_WITH_COLLECTIVES = (Phase.KV_ALLOCATION, Phase.PREFILL, Phase.DECODE)
RAISED = {Fault.EXCEPTION: "RuntimeError", Fault.MEMORY_ERROR: "MemoryError"}


class Outcome(StrEnum):
    """What must come of a fault."""

    FATAL = "all ends, the cause is named"
    REPLACED = "ranks are replaced, requests go on"
    HARMLESS = "it was asked to end anyway"
    WAITS = "all waits and goes on after SIGCONT"
    GOES_DOWN = "all ends with it"


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault to one process, while the ranks are in one phase."""

    victim: Victim
    phase: Phase
    fault: Fault

    def __str__(self) -> str:
        return f"{self.victim}/{self.phase.words}/{self.fault}"

    @property
    def slug(self) -> str:
        """The name, fit for files."""
        return re.sub(r"[^A-Za-z0-9]+", "-", str(self))


def all_cells() -> Iterator[Cell]:
    """Yield every cell, also those that make no sense."""
    for victim in Victim:
        for phase in PHASES:
            for fault in Fault:
                yield Cell(victim, phase, fault)


def why_not_applicable(cell: Cell) -> str:
    """Return why this cell makes no sense; "" when it does."""
    is_rank = cell.victim in RANKS
    if cell.fault is Fault.SKIP and not is_rank:
        return f"the {cell.victim} calls no collective"
    if cell.fault is Fault.SKIP and cell.phase not in _WITH_COLLECTIVES:
        return "ranks call no collective in this phase"
    if cell.fault in RAISED and is_rank and cell.phase is Phase.SPAWN:
        return "no Python runs in it yet"
    return ""


def outcome_of(cell: Cell) -> Outcome:
    """Return what must come of it."""
    if cell.victim is Victim.SUPERVISOR:
        return Outcome.WAITS if cell.fault is Fault.SIGSTOP else Outcome.GOES_DOWN
    if cell.phase is Phase.SHUTDOWN:
        return Outcome.HARMLESS
    if cell.victim is Victim.COORDINATOR or cell.phase not in _SERVING:
        return Outcome.FATAL
    return Outcome.REPLACED


def exit_code_of(cell: Cell) -> int:
    """Return the exit code that the program must have; negative: killed by that signal."""
    if outcome_of(cell) is not Outcome.GOES_DOWN:
        return 1 if outcome_of(cell) is Outcome.FATAL else 0
    codes = {Fault.SIGKILL: -9, Fault.SIGSEGV: -11, Fault.SIGTERM: 143, Fault.EXIT: EXIT_CODE}
    return codes.get(cell.fault, 1)


def keeps_tokens(cell: Cell) -> bool:
    """Tell whether every client must get all its tokens."""
    return outcome_of(cell) in (Outcome.REPLACED, Outcome.HARMLESS, Outcome.WAITS)


def limit_s(cell: Cell) -> float:
    """Return the seconds within which the fault must be noticed; for the supervisor: all must be gone."""
    if cell.fault in (Fault.SIGSTOP, Fault.SKIP):
        # The clock of a stall runs from the last sign of any rank, and the others still import.
        others_s = _IMPORT_S if cell.phase in (Phase.SPAWN, Phase.IMPORT) else 0.0
        return STALL_TIMEOUT_S + others_s + 1.0
    is_orderly = cell.victim is Victim.SUPERVISOR and cell.fault in (Fault.SIGTERM, *RAISED)
    return SHUTDOWN_GRACE_S + _ORDERLY_END_S if is_orderly else 1.0


def cause_pattern(cell: Cell) -> str | None:
    """Return what a line must have in it to name the cause; None where there is nobody to say it.

    A process that a signal has ended cannot say so itself; its exit code does.
    """
    outcome, fault = outcome_of(cell), cell.fault
    if outcome in (Outcome.HARMLESS, Outcome.WAITS):
        return None
    if outcome is Outcome.GOES_DOWN:
        return rf"{RAISED[fault]}: {MESSAGE}" if fault in RAISED else None
    if fault in RAISED:
        failed = rf"{cell.victim} \(.*failed in phase .*{RAISED[fault]}: {MESSAGE}"
        # Before a line of ours runs, Python itself says what it was; that is in the log lines above this one.
        is_early = cell.phase in (Phase.SPAWN, Phase.IMPORT) and cell.victim is Victim.COORDINATOR
        return (
            rf"{failed}|{cell.victim} \(pid \d+\) ended unexpectedly with exit code 1" if is_early else failed
        )
    if fault is Fault.SKIP:
        name = rf"{cell.victim}\b"
        return rf"{name}.*skipped a collective|the ranks have diverged: .*{name}|waited .* for {name}"
    if fault is Fault.SIGSTOP:
        return rf"{cell.victim} \(.*\bstopped\b"
    if fault is Fault.EXIT:
        return rf"{cell.victim} \(pid \d+\) ended unexpectedly with exit code {EXIT_CODE}"
    return rf"{cell.victim} \(pid \d+\) was killed by {fault}"


def phase_pattern(cell: Cell) -> str | None:
    """Return what the same line must have in it to name the phase; None where none is to be expected.

    The coordinator is in no phase of the ranks, and ranks that have diverged name the collective instead.
    """
    if cell.victim not in RANKS or cause_pattern(cell) is None or cell.fault is Fault.SKIP:
        return None
    words = re.escape(cell.phase.words)
    if cell.fault is not Fault.SIGSTOP:
        return rf"in phase {words}"
    where = {Phase.SPAWN: "last seen in spawn", Phase.IDLE: "last seen idle"}
    steps = {phase: rf"step \d+ \({words}\)" for phase in (Phase.PREFILL, Phase.DECODE)}
    return {**where, **steps}.get(cell.phase, f"last seen in {words}")
