"""What clients and the log are told once all ranks are ready. Knows nothing of how they came to be."""

from __future__ import annotations

from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.scheduler import Scheduler
from tprt.log import get_logger
from tprt.messages import EngineReady

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
