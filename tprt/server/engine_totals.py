"""What several replicas add up to, for whoever wants to know of the whole deployment.

Knows nothing of how that is shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from tprt.messages import EngineStats


def add_up(stats: Sequence[EngineStats]) -> EngineStats:
    """Return the sum of what replicas say of themselves: `epoch` is how many groups of ranks were replaced.

    What is no sum is that of the replica whose request has waited longest, or whose step has ended last.
    """
    if len(stats) == 1:
        return stats[0]
    running = [one for one in stats if one.num_steps]
    counts = [one.queue_counts for one in stats if one.queue_counts]
    return EngineStats(
        epoch=sum(one.epoch for one in stats),
        is_serving=any(one.is_serving for one in stats),
        num_running=sum(one.num_running for one in stats),
        num_waiting=sum(one.num_waiting for one in stats),
        oldest_waiting_s=max(one.oldest_waiting_s for one in stats),
        num_free_blocks=sum(one.num_free_blocks for one in stats),
        num_blocks=sum(one.num_blocks for one in stats),
        num_preemptions=sum(one.num_preemptions for one in stats),
        num_prompt_tokens=sum(one.num_prompt_tokens for one in stats),
        num_cached_tokens=sum(one.num_cached_tokens for one in stats),
        num_generated_tokens=sum(one.num_generated_tokens for one in stats),
        num_steps=sum(one.num_steps for one in stats),
        last_step_s=min((one.last_step_s for one in running), default=0.0),
        queue_counts=tuple(sum(column) for column in zip(*counts, strict=True)),
        queue_sum_s=sum(one.queue_sum_s for one in stats),
    )
