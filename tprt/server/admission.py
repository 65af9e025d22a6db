"""How many requests may be in the engine at a time, and when one that is refused may come again.

Reads no clock; knows nothing of what a request is.
"""

from __future__ import annotations

import math
from collections import deque

from tprt.errors import InvalidRequestError

_MAX_RETRY_S = 60
# Requests that ended last, from which the pace is taken.
_NUM_ENDS = 64


class Admission:
    """Counts what is there against the places that there are."""

    def __init__(self, max_running: int, max_queued: int) -> None:
        """Assign only.

        Args:
            max_running: requests that run at a time.
            max_queued: requests beyond those that may wait for a place.
        """
        self._max_running = max_running
        self._max_queued = max_queued
        self._ends: deque[float] = deque(maxlen=_NUM_ENDS)

    def has_places(self, count: int, num_present: int) -> bool:
        """Tell whether `count` more may come to `num_present`.

        Raises:
            InvalidRequestError: there are fewer places than that in all.
        """
        num_places = self._max_running + self._max_queued
        if count > num_places:
            raise InvalidRequestError(
                f"the request asks for {count} outputs, prompts times n, and this server takes {num_places} at"
                " a time; send several requests"
            )
        return num_present + count <= num_places

    def on_end(self, now_s: float) -> None:
        """Note that a request has ended."""
        self._ends.append(now_s)

    def retry_after_s(self, num_present: int, now_s: float) -> int:
        """Return in how many seconds, 1 to 60, those that wait will have found a place at the present pace."""
        num_waiting = max(1, num_present - self._max_running)
        if not self._ends:
            return 1
        # Without the first end this would be a pace of one more end than there were in that time.
        pace = max(1, len(self._ends) - 1) / max(now_s - self._ends[0], 1e-3)
        return min(_MAX_RETRY_S, max(1, math.ceil(num_waiting / pace)))
