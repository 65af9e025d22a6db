"""Whether the coordinator, which is there, still does anything: asked now and then, and looked at from outside.

A coordinator that has ended is the supervisor's business. Knows nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tprt.config import SupervisionConfig
from tprt.errors import EngineDeadError
from tprt.transport.peer_process import is_stopped, process_state

# A coordinator answers between two steps, and says so itself when a step takes too long; it is asked now and
# then whether it still does, and has this much longer than a step.
_PULSE_S = 5.0
_PULSE_GRACE_S = 2.0


class CoordinatorPulse:
    """Signs of life of the coordinator with process id `pid`; `is_stuck` once it has been given up."""

    def __init__(self, pid: int, supervision: SupervisionConfig) -> None:
        self._pid = pid
        self._supervision = supervision
        self.is_stuck = False
        self._stopped_s: float | None = None
        self._asked_s: float | None = None
        self._last_asked_s = -_PULSE_S

    def raise_if_stopped(self) -> None:
        """Look at its process.

        Raises:
            EngineDeadError: it has been stopped for `supervision.stall_timeout_s`.
        """
        now_s = time.monotonic()
        if not is_stopped(process_state(self._pid)):
            self._stopped_s = None
        elif self._stopped_s is None:
            self._stopped_s = now_s
        elif now_s - self._stopped_s > self._supervision.stall_timeout_s:
            self.is_stuck = True
            raise EngineDeadError(
                f"coordinator (pid {self._pid}) has been stopped (state T) for"
                f" {self._supervision.stall_timeout_s:g} s (supervision.stall_timeout_s)"
            )

    def feel(self, answered: bool, ask: Callable[[], None]) -> None:
        """Note whether it has `answered`, and `ask` for a sign of life now and then.

        Raises:
            EngineDeadError: it is stopped, or none has come in time.
        """
        self.raise_if_stopped()
        now_s = time.monotonic()
        if answered:
            self._asked_s = None
        limit_s = self._supervision.step_timeout_s + _PULSE_GRACE_S
        if self._asked_s is not None and now_s - self._asked_s > limit_s:
            self.is_stuck = True
            raise EngineDeadError(
                f"coordinator (pid {self._pid}) is there but has not answered for {limit_s:g} s"
                " (supervision.step_timeout_s and a little more): it is stuck"
            )
        if self._asked_s is None and now_s - self._last_asked_s >= _PULSE_S:
            self._asked_s = self._last_asked_s = now_s
            ask()
