"""What the requests of a server add up to: how many, how long, how fast, and how they ended.

Called for every piece of every stream, so each call is a few additions. Knows nothing of Prometheus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from tprt.messages import SamplingParams
from tprt.server.histogram import Histogram

FINISH_REASONS = ("stop", "length", "abort", "error")
"""Those that are shown even while they have not occurred."""

# Bounds of times in seconds: those of vLLM's metrics, and more between and below them.
_FIRST_TOKEN_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4),
    *(0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
_NUM_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class RequestTotals:
    """The sums over all requests of a replica, or of all replicas, since the start.

    Attributes:
        num_open: requests that have begun and not ended.
        num_prompt_tokens: of the prompts whose first token has come.
        num_generated_tokens: tokens handed to clients.
        ended: requests by finish reason.
        first_token_s: from a request's beginning to its first token.
        between_tokens_s: from one token to the next, one value for each token after the first.
        per_token_s: the same, averaged over each request that has ended.
        request_s, decode_s: from the beginning, and from the first token, to the end.
        prompt_tokens, generated_tokens, max_tokens: of each request that has ended.
    """

    def __init__(self) -> None:
        self.num_open = self.num_prompt_tokens = self.num_generated_tokens = 0
        self.ended: Counter[str] = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self.first_token_s = Histogram(_FIRST_TOKEN_S)
        self.between_tokens_s, self.per_token_s = Histogram(_BETWEEN_TOKENS_S), Histogram(_BETWEEN_TOKENS_S)
        self.request_s, self.decode_s = Histogram(_REQUEST_S), Histogram(_REQUEST_S)
        self.prompt_tokens, self.generated_tokens = Histogram(_NUM_TOKENS), Histogram(_NUM_TOKENS)
        self.max_tokens = Histogram(_NUM_TOKENS)

    def merge(self, other: RequestTotals) -> None:
        """Add what `other` has counted."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, Histogram):
                mine.merge(value)
            elif isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)


class RequestMetrics:
    """One request, from its beginning to its end."""

    __slots__ = (
        *("_clock", "_first_s", "_is_open", "_last_s", "_max_tokens", "_num_prompt", "_num_tokens"),
        *("_started_s", "_totals"),
    )

    def __init__(
        self,
        totals: RequestTotals,
        num_prompt_tokens: int,
        sampling: SamplingParams,
        clock: Callable[[], float],
    ) -> None:
        """Begin now; `clock` gives seconds."""
        self._totals = totals
        self._clock = clock
        self._num_prompt = num_prompt_tokens
        self._max_tokens = sampling.max_tokens
        self._num_tokens = 0
        self._is_open = True
        self._started_s = self._first_s = self._last_s = clock()
        totals.num_open += 1

    def on_tokens(self, count: int) -> None:
        """Note that `count` tokens have come at once; the time since the last ones is shared among them."""
        if count <= 0:
            return
        totals, now_s = self._totals, self._clock()
        since_s, self._last_s = now_s - self._last_s, now_s
        totals.num_generated_tokens += count
        if self._num_tokens:
            totals.between_tokens_s.add(since_s / count, count)
        else:
            self._begin_output(since_s, now_s, count)
        self._num_tokens += count

    def _begin_output(self, since_s: float, now_s: float, count: int) -> None:
        totals = self._totals
        totals.first_token_s.add(since_s)
        totals.num_prompt_tokens += self._num_prompt
        self._first_s = now_s
        if count > 1:
            # They came with the first, and nobody has waited for them.
            totals.between_tokens_s.add(0.0, count - 1)

    def on_end(self, reason: str) -> None:
        """Note the end; a second one counts for nothing.

        Args:
            reason: a finish reason, or "error" for a request that was refused or that the engine failed; such a
                one is counted, and its lengths and times are not.
        """
        if not self._is_open:
            return
        self._is_open = False
        totals = self._totals
        totals.num_open -= 1
        totals.ended[reason] += 1
        if reason != "error":
            totals.prompt_tokens.add(self._num_prompt)
            totals.generated_tokens.add(self._num_tokens)
            totals.max_tokens.add(self._max_tokens)
            self._add_times()

    def _add_times(self) -> None:
        totals = self._totals
        totals.request_s.add(self._clock() - self._started_s)
        if self._num_tokens:
            decode_s = self._last_s - self._first_s
            totals.decode_s.add(decode_s)
            if self._num_tokens > 1:
                totals.per_token_s.add(decode_s / (self._num_tokens - 1))
