"""What an engine has done since its start, as plain integers that outlive its worker groups.

Counted where it costs nothing for each token: when a sequence first runs, when one is preempted, and once for
each step. Knows nothing of who asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from tprt.messages import QUEUE_BOUNDS_S


class EngineCounters:
    """The counters of one engine.

    Attributes:
        num_preemptions: sequences sent back to the queue for want of blocks.
        num_prompt_tokens, num_cached_tokens: tokens of the prompts that ran, each counted once however often
            it is computed, and those of them found in the prefix cache.
        num_generated_tokens: tokens sampled for a request that had not ended.
        num_steps: steps brought to their end.
        last_step_ns: when the last one ended, on the caller's clock; 0 before the first.
        queue_counts, queue_sum_s: as in `EngineStats`.
    """

    __slots__ = (
        "_first_runs",
        "last_step_ns",
        "num_cached_tokens",
        "num_generated_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_steps",
        "queue_counts",
        "queue_sum_s",
    )

    def __init__(self) -> None:
        self.num_preemptions = 0
        self.num_prompt_tokens = self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self.num_steps = self.last_step_ns = 0
        self.queue_counts, self.queue_sum_s = [0] * (len(QUEUE_BOUNDS_S) + 1), 0.0
        # Of the prompts that run from the step on that is about to begin.
        self._first_runs: list[tuple[int, Callable[[float], None]]] = []

    def prompt_runs(
        self, num_tokens: int, num_cached_tokens: int, arrived_ns: int, tell: Callable[[float], None]
    ) -> None:
        """Count a prompt that is to run for the first time; `tell` will hear how long it has waited by then."""
        self.num_prompt_tokens += num_tokens
        self.num_cached_tokens += num_cached_tokens
        self._first_runs.append((arrived_ns, tell))

    def step_began(self, now_ns: int) -> None:
        """Note how long the prompts waited that this step is the first of."""
        for arrived_ns, tell in self._first_runs:
            waited_s = (now_ns - arrived_ns) / 1e9
            self.queue_counts[bisect_left(QUEUE_BOUNDS_S, waited_s)] += 1
            self.queue_sum_s += waited_s
            tell(waited_s)
        self._first_runs.clear()

    def step_ended(self, num_tokens: int, now_ns: int) -> None:
        """Count a step that brought `num_tokens` tokens."""
        self.num_generated_tokens += num_tokens
        self.num_steps += 1
        self.last_step_ns = now_ns
