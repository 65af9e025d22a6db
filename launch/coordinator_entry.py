"""The process of the coordinator: `python -m launch.coordinator_entry`, started by tprt."""

from __future__ import annotations

import os
from pathlib import Path

from launch.child import EPOCH, RUN_DIR, die_with_parent, run_child
from launch.run_dir import read_config, request_address, worker_socket
from tprt.checkpoint_config import CheckpointConfig, read_checkpoint_config, resolve_max_model_len
from tprt.config import Config
from tprt.coordinator.coordinator import Coordinator
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.scheduler import Scheduler
from tprt.log import configure_logging
from tprt.transport.hub import ShmWorkerHub
from tprt.transport.zmq_socket import RequestServer

NAME = "coordinator"


def make_scheduler(config: Config, checkpoint: CheckpointConfig, num_blocks: int, epoch: int) -> Scheduler:
    """Return the scheduler of a deployment whose ranks have `num_blocks` KV blocks each."""
    limits = SchedulerLimits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=resolve_max_model_len(checkpoint, config.model.max_model_len),
        block_size=config.cache.block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    return Scheduler(limits, checkpoint.eos_token_ids, checkpoint.vocab_size, epoch)


def serve(config: Config, run_dir: Path, epoch: int) -> None:
    """Open the lanes and run the coordinator until a client ends it."""
    checkpoint = read_checkpoint_config(config.model.path)
    world_size = config.parallel.tensor_parallel_size
    hub = ShmWorkerHub.listen(worker_socket(run_dir, epoch), epoch=epoch, world_size=world_size)
    clients = RequestServer.bind(request_address(run_dir))
    try:
        coordinator = Coordinator(
            clients,
            hub,
            lambda num_blocks: make_scheduler(config, checkpoint, num_blocks, epoch),
            world_size,
            config.supervision,
            epoch,
        )
        coordinator.run()
    finally:
        hub.close()
        clients.close()


def main() -> None:
    """Run the coordinator."""
    die_with_parent()
    run_dir, epoch = Path(os.environ[RUN_DIR]), int(os.environ[EPOCH])
    config = read_config(run_dir)
    configure_logging(config.logging.level, config.logging.format, NAME)
    run_child(NAME, run_dir, lambda: "coordination", lambda: serve(config, run_dir, epoch))


if __name__ == "__main__":
    main()
