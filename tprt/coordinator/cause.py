"""Of several failures that belong together, the one that the others follow from.

Whoever sees a failure says what kind it is; the order between kinds is here and nowhere else. Knows nothing of
processes, exit codes and messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from tprt.errors import EngineDeadError


class CauseKind(IntEnum):
    """What a failure says about its cause, the most telling kind first."""

    OWN_ERROR = 0
    """A process's own error, in its own words."""
    SILENT_DEATH = 1
    """A process is gone without a word."""
    OBSERVED = 2
    """Processes that are there do not do what they should, as seen from outside."""
    CONSEQUENCE = 3
    """A process only reports that another one is gone."""


@dataclass(frozen=True, slots=True)
class Cause:
    """One failure.

    Attributes:
        kind: what it says about the cause.
        text: for people; the gist is in the last line, and the traceback above it.
        time_ns: when it came, on a clock that all causes compared here share; 0 where only the order counts.
        is_input_error: nothing but the user can put it right, so that another try would fail alike.
        is_from_outside: a signal that nobody in the group raises by itself.
    """

    kind: CauseKind
    text: str
    time_ns: int = 0
    is_input_error: bool = False
    is_from_outside: bool = False

    @property
    def gist(self) -> str:
        """The last line."""
        return self.text.splitlines()[-1] if self.text else ""


class GroupFailedError(EngineDeadError):
    """The worker group cannot go on; whether the engine can is for whoever catches this to decide."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.text)
        self.cause = cause


def first_cause(causes: Sequence[Cause]) -> Cause:
    """Return the failure that the others follow from: by kind, then by time, then the first in `causes`."""
    return min(causes, key=lambda cause: (cause.kind, cause.time_ns))
