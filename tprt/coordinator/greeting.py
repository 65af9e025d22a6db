"""What clients and the log are told of the engine. Knows nothing of how its ranks came to be."""

from __future__ import annotations

from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.scheduler import Scheduler
from tprt.log import get_logger
from tprt.messages import EngineReady, EngineStats

_LOG = get_logger(__name__)


def greet(scheduler: Scheduler, world_size: int) -> EngineReady:
    """Return what a client is told of the engine."""
    limits = scheduler.limits
    return EngineReady(
        epoch=scheduler.epoch,
        world_size=world_size,
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        max_model_len=limits.max_sequence_len,
    )


def describe(scheduler: Scheduler, is_serving: bool, now_ns: int) -> EngineStats:
    """Return what a client is told that asks how the engine is doing.

    Args:
        scheduler: of the newest epoch.
        is_serving: whether all its ranks are ready.
        now_ns: now, on the clock that requests and steps are noted by.
    """
    counters, oldest_ns = scheduler.counters, scheduler.oldest_waiting_ns
    return EngineStats(
        epoch=scheduler.epoch,
        is_serving=is_serving,
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        oldest_waiting_s=(now_ns - oldest_ns) / 1e9 if oldest_ns else 0.0,
        num_free_blocks=scheduler.num_free_blocks,
        num_blocks=scheduler.limits.num_blocks,
        num_preemptions=counters.num_preemptions,
        num_prompt_tokens=counters.num_prompt_tokens,
        num_cached_tokens=counters.num_cached_tokens,
        num_generated_tokens=counters.num_generated_tokens,
        num_steps=counters.num_steps,
        last_step_s=(now_ns - counters.last_step_ns) / 1e9 if counters.num_steps else 0.0,
        queue_counts=tuple(counters.queue_counts),
        queue_sum_s=counters.queue_sum_s,
    )


def log_ready(limits: SchedulerLimits, world_size: int) -> None:
    """Log what there is room for."""
    _LOG.info(
        "%d ranks are ready: %d KV blocks of %d tokens, sequences of up to %d tokens",
        *(world_size, limits.num_blocks, limits.block_size, limits.max_sequence_len),
    )
    if limits.max_sequence_len < limits.max_model_len:
        _LOG.warning(
            "the KV blocks hold %d tokens, less than max_model_len %d; longer outputs end there",
            *(limits.num_blocks * limits.block_size, limits.max_model_len),
        )
