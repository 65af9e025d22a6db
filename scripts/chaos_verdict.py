"""Judges what was seen of a cell of the chaos matrix.

Knows nothing of how a cell is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.chaos_cell import Seen
from scripts.chaos_matrix import (
    MESSAGE,
    RAISED,
    Cell,
    Outcome,
    cause_pattern,
    exit_code_of,
    keeps_tokens,
    limit_s,
    outcome_of,
    phase_pattern,
)
from tprt.transport.heartbeat import Phase

_MAX_LOG = 3000


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a cell is worth.

    Attributes:
        names_cause, names_phase: whether the message does; None where there is nobody to say it.
        tokens_equal: whether every client got all its tokens; None where it is not to.
        problems: what is not as it must be.
        is_slow: noticed later than it must be; on a loaded machine that alone proves nothing.
    """

    names_cause: bool | None
    names_phase: bool | None
    tokens_equal: bool | None
    problems: list[str]
    is_slow: bool


def judge(cell: Cell, seen: Seen, expected: Sequence[Sequence[int]]) -> Judgement:
    """Compare what was seen with what must come of `cell`; `expected` are the tokens of an undisturbed run."""
    cause, phase = cause_pattern(cell), phase_pattern(cell)
    # What ends all must be in the last line that is seen; what does not, somewhere in the log.
    last = seen.log.rstrip().rpartition("\n")[2]
    text = last if outcome_of(cell) is Outcome.FATAL else seen.log
    is_told = cell.fault not in RAISED or MESSAGE in seen.log
    names_cause = None if cause is None else is_told and re.search(cause, text) is not None
    names_phase = None if phase is None else re.search(phase, seen.line) is not None
    wanted = [list(tokens) for tokens in expected] * (2 if cell.phase is Phase.IDLE else 1)
    tokens_equal = seen.tokens == wanted if keeps_tokens(cell) else None
    is_slow = seen.detection_s is not None and seen.detection_s > limit_s(cell)
    judgement = Judgement(names_cause, names_phase, tokens_equal, [], is_slow)
    judgement.problems.extend(_problems(cell, seen, judgement))
    return judgement


def _problems(cell: Cell, seen: Seen, judgement: Judgement) -> Iterator[str]:
    if seen.failure:
        yield seen.failure
    elif seen.exit_code != exit_code_of(cell):
        yield f"exit code {seen.exit_code}, expected {exit_code_of(cell)}"
    if judgement.names_cause is False:
        yield "the cause is not named"
    if judgement.names_phase is False:
        yield "the phase is not named"
    if judgement.tokens_equal is False:
        yield "tokens differ from the undisturbed run's"
    if judgement.is_slow:
        yield f"noticed after {seen.detection_s:.1f} s, {limit_s(cell):g} s at most"
    if seen.survivors:
        yield f"{len(seen.survivors)} processes survive"
    if seen.leftovers:
        yield f"left behind: {', '.join(seen.leftovers)}"


def row(cell: Cell, seen: Seen, expected: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the cell with all that was seen of it, for JSON."""
    judgement = judge(cell, seen, expected)
    return {
        **head(cell),
        "outcome": outcome_of(cell),
        "detection_s": None if seen.detection_s is None else round(seen.detection_s, 3),
        "limit_s": limit_s(cell),
        "names_cause": judgement.names_cause,
        "names_phase": judgement.names_phase,
        "line": seen.line,
        "exit_code": seen.exit_code,
        "expected_exit_code": exit_code_of(cell),
        "survivors": seen.survivors,
        "leftovers": seen.leftovers,
        "tokens_equal": judgement.tokens_equal,
        "seconds": round(seen.seconds, 1),
        "verdict": "bad" if judgement.problems else "good",
        "problems": judgement.problems,
        "log": seen.log[-_MAX_LOG:] if judgement.problems else "",
    }


def head(cell: Cell) -> dict[str, Any]:
    """Return what tells one row from another."""
    return {"cell": str(cell), "victim": cell.victim, "phase": cell.phase.words, "fault": cell.fault}
