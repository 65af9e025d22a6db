"""The last minutes of a server: the sums of its metrics as they were, once for each answer of the engine.

Knows nothing of how they are drawn.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tprt.messages import EngineStats
from tprt.server.request_metrics import RequestTotals

KEPT_S = 300.0
"""How long a moment is kept."""
# The engine is asked once a second; a moment that comes sooner than this after the last is left out.
_SPACING_S = 0.8


@dataclass(frozen=True, slots=True)
class Moment:
    """The sums at one moment.

    Attributes:
        time_s: that moment, on the clock of the metrics.
        stats: what the engine said.
        num_prompt_tokens, num_generated_tokens: as in `RequestTotals`.
        first_token_counts, between_tokens_counts: the counts of its histograms.
    """

    time_s: float
    stats: EngineStats
    num_prompt_tokens: int
    num_generated_tokens: int
    first_token_counts: tuple[int, ...]
    between_tokens_counts: tuple[int, ...]


class MetricsHistory:
    """The moments of the last `KEPT_S` seconds, oldest first."""

    def __init__(self) -> None:
        self.moments: deque[Moment] = deque()

    def add(self, time_s: float, stats: EngineStats, totals: RequestTotals) -> None:
        """Keep this moment, and forget what is too old."""
        moments = self.moments
        if moments and time_s - moments[-1].time_s < _SPACING_S:
            return
        moments.append(
            Moment(
                time_s,
                stats,
                totals.num_prompt_tokens,
                totals.num_generated_tokens,
                tuple(totals.first_token_s.counts),
                tuple(totals.between_tokens_s.counts),
            )
        )
        while time_s - moments[0].time_s > KEPT_S:
            moments.popleft()
