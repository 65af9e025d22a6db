"""The process of the coordinator: `python -m launch.coordinator_entry`, started by tprt."""

from __future__ import annotations

from launch.parent_death import RUN_DIR, clean_up_after_parent, remove_run_dir

if __name__ == "__main__":
    # Before the imports below, which take their time.
    clean_up_after_parent()

import os
import select
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from launch.child import EPOCH, STEPS_FD, STEPS_TOKEN, SUPERVISOR_FD, log_name, run_child
from launch.run_dir import heartbeats_path, read_config, request_address, stack_path, worker_socket
from launch.stack_dump import install_stack_dumps
from tprt.checkpoint_config import (
    CheckpointConfig,
    end_token_ids,
    read_checkpoint_config,
    resolve_max_model_len,
)
from tprt.config import Config
from tprt.coordinator.coordinator import Coordinator
from tprt.coordinator.grammar import GrammarCompiler
from tprt.coordinator.group_keeper import SupervisorLane
from tprt.coordinator.group_watch import GroupWatch
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.scheduler import Scheduler
from tprt.coordinator.worker_group import WorkerGroup
from tprt.errors import InvalidRequestError
from tprt.log import configure_logging
from tprt.transport.channel import WorkerHub
from tprt.transport.hub import ShmWorkerHub
from tprt.transport.remote_writer import RemoteStepWriter
from tprt.transport.spread_hub import SpreadWorkerHub
from tprt.transport.zmq_socket import RequestServer

NAME = "coordinator"


def make_scheduler(config: Config, checkpoint: CheckpointConfig, epoch: int, num_blocks: int) -> Scheduler:
    """Return the scheduler of a deployment whose ranks have `num_blocks` KV blocks each."""
    limits = SchedulerLimits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=resolve_max_model_len(checkpoint, config.model.max_model_len),
        block_size=config.cache.block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        schedules_ahead=config.scheduler.async_scheduling,
    )
    eos_token_ids, vocab_size = checkpoint.eos_token_ids, checkpoint.vocab_size
    grammars = GrammarCompiler(lambda: _read_tokenizer(Path(config.model.path)), eos_token_ids, vocab_size)
    return Scheduler(limits, eos_token_ids, vocab_size, epoch, grammars=grammars)


def _read_tokenizer(folder: Path) -> str:
    """Return the text of the model's tokenizer.json.

    Raises:
        InvalidRequestError: it cannot be read.
    """
    try:
        return (folder / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            "a grammar needs the model's tokenizer.json, which cannot be read:"
            f" {error.strerror if isinstance(error, OSError) else error}"
        ) from error


def _take_remote_lanes(config: Config) -> Callable[[int], RemoteStepWriter] | None:
    """Return what lets in the ranks that other hosts have of an epoch; None where there are no other hosts."""
    if config.hosts.nnodes == 1:
        return None
    listener = socket.socket(fileno=int(os.environ.pop(STEPS_FD)))
    listener.set_inheritable(False)
    token = os.environ.pop(STEPS_TOKEN).encode()
    ranks = range(len(config.ranks_of(0)), config.parallel.tensor_parallel_size)
    return lambda epoch: RemoteStepWriter(listener.dup(), epoch, ranks, token)


def serve(config: Config, run_dir: Path, first_epoch: int, supervisor: socket.socket) -> None:
    """Open the lanes and run the coordinator until a client ends it."""
    checkpoint = read_checkpoint_config(config.model.path)
    # Now, while the ranks load, since it may take a look into a large file.
    checkpoint = replace(checkpoint, eos_token_ids=end_token_ids(config.model.path, checkpoint))
    world_size = config.parallel.tensor_parallel_size

    open_remote = _take_remote_lanes(config)

    def open_hub(epoch: int) -> WorkerHub:
        num_local = len(config.ranks_of(config.hosts.node_rank))
        local = ShmWorkerHub.listen(worker_socket(run_dir, epoch), epoch=epoch, world_size=num_local)
        return local if open_remote is None else SpreadWorkerHub(local, open_remote(epoch))

    def open_watch(epoch: int) -> GroupWatch:
        stack_paths = [stack_path(run_dir, f"rank {rank}") for rank in range(world_size)]
        return GroupWatch(heartbeats_path(run_dir, epoch), stack_paths, epoch)

    lane = SupervisorLane(supervisor, open_hub, open_watch)
    hub = open_hub(first_epoch)
    clients = RequestServer.bind(request_address(run_dir))
    try:
        group = WorkerGroup(hub, world_size, first_epoch, config.supervision, open_watch(first_epoch))
        make = partial(make_scheduler, config, checkpoint, first_epoch)
        Coordinator(clients, group, make, config.supervision, lane).run()
    finally:
        hub.close()
        clients.close()
        lane.close()


def main() -> None:
    """Run the coordinator."""
    run_dir = Path(os.environ[RUN_DIR])
    install_stack_dumps(run_dir, NAME)
    # Whatever this process starts must not hold the lane open.
    supervisor = socket.socket(fileno=int(os.environ.pop(SUPERVISOR_FD)))
    supervisor.set_inheritable(False)
    config = read_config(run_dir)
    configure_logging(config.logging.level, config.logging.format, log_name(NAME))
    run_child(
        NAME,
        run_dir,
        lambda: "coordination",
        lambda: serve(config, run_dir, int(os.environ[EPOCH]), supervisor),
        partial(_clean_up_if_alone, supervisor.dup()),
    )


def _clean_up_if_alone(supervisor: socket.socket, error: Exception) -> None:
    """Remove the run directory when the supervisor has gone.

    Its descriptors are closed before the signal of its death is sent, so this process may fail and end on that
    before the signal comes.
    """
    poller = select.poll()
    poller.register(supervisor.fileno(), 0)
    if poller.poll(0):
        remove_run_dir()


if __name__ == "__main__":
    main()
    # The ranks are gone, and nobody needs it any more; if the client is killed now, nobody else would do it.
    remove_run_dir()
