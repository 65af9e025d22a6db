"""The signs of life of every replica's coordinator.

One that is stuck ends its replica, and the deployment where it is the last. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

from launch.coordinator_pulse import CoordinatorPulse
from tprt.errors import EngineDeadError


class ReplicaPulses:
    """The pulses by number of the replica; `give_up` ends one that others can go on without."""

    def __init__(self, pulses: Mapping[int, CoordinatorPulse], give_up: Callable[[int, str], None]) -> None:
        self._pulses = dict(pulses)
        self._give_up = give_up
        self._is_stuck = False

    @property
    def is_stuck(self) -> bool:
        """Tell whether the last coordinator has been given up."""
        return self._is_stuck

    def forget(self, lost: Collection[int]) -> None:
        """Ask nothing more of replicas that are lost."""
        for number in lost:
            self._pulses.pop(number, None)

    def raise_if_stopped(self) -> None:
        """Look at the coordinators' processes.

        Raises:
            EngineDeadError: the last one has been stopped for too long.
        """
        for number in list(self._pulses):
            self._look(number, self._pulses[number].raise_if_stopped)

    def feel(self, answered: Collection[int], ask: Callable[[int], None]) -> None:
        """Note which have `answered`, and `ask` for a sign of life now and then.

        Raises:
            EngineDeadError: the last one is stopped, or has given none in time.
        """
        for number in list(self._pulses):
            feel = self._pulses[number].feel
            self._look(number, partial(feel, number in answered, partial(ask, number)))

    def _look(self, number: int, look: Callable[[], None]) -> None:
        try:
            look()
        except EngineDeadError as error:
            if len(self._pulses) == 1:
                self._is_stuck = True
                raise
            del self._pulses[number]
            self._give_up(number, str(error))
