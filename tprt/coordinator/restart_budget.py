"""How often a worker group may be replaced before the engine gives up.

Restarts within a window are counted. Two rules keep a request that kills from eating up what all others live
on: the death of a step that a suspect ran alone is counted apart, and once a request has been found guilty the
restarts that it caused before are given back. A group that is broken whatever it runs ends the engine all the
same: of deaths of suspects without a finished step between them no more are allowed than of the others.

Reads no clock; knows nothing of why a group died.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Restart:
    time_s: float
    failed_epoch: int


class RestartBudget:
    """The restarts of one engine."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._restarts: list[_Restart] = []
        self._num_trials_in_a_row = 0

    @property
    def max_restarts(self) -> int:
        """Most restarts within the window."""
        return self._max_restarts

    @property
    def num_spent(self) -> int:
        """Restarts that counted when the last one was asked for."""
        return len(self._restarts)

    def step_finished(self) -> None:
        """Note that the group works."""
        self._num_trials_in_a_row = 0

    def try_spend(self, now_s: float, failed_epoch: int) -> bool:
        """Count a restart after the death of `failed_epoch`; False when there have been too many."""
        self._restarts = [r for r in self._restarts if now_s - r.time_s < self._window_s]
        if len(self._restarts) >= self._max_restarts:
            return False
        self._restarts.append(_Restart(now_s, failed_epoch))
        return True

    def try_spend_on_trial(self) -> bool:
        """Count a restart after a suspect died alone; False when nothing but that has happened for too long."""
        if self._num_trials_in_a_row >= self._max_restarts:
            return False
        self._num_trials_in_a_row += 1
        return True

    def give_back(self, failed_epochs: Collection[int]) -> None:
        """Forget the restarts after the deaths of these epochs: what caused them is gone."""
        self._restarts = [r for r in self._restarts if r.failed_epoch not in failed_epochs]
