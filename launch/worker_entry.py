"""The process of one rank: `python -m launch.worker_entry`, started by tprt or by torchrun.

Reads RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE as torchrun sets them, and the run directory and
epoch from variables of tprt's own. Without those it was started by torchrun, and gets them in `torchrun.entry`.
"""

from __future__ import annotations

import os

from launch.job_signals import leave_sigterm_to_parent
from launch.parent_death import PARENT_PID, RUN_DIR, die_with_parent

if __name__ == "__main__":
    if RUN_DIR not in os.environ:
        # The parent is torchrun, whatever has started that one.
        os.environ.pop(PARENT_PID, None)
    else:
        leave_sigterm_to_parent()
    # Before the imports below, which take their time.
    die_with_parent()

import contextlib
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.child import EPOCH, STEPS_ADDRESS, STEPS_TOKEN, STORE_FD, log_name, run_child
from launch.lasting_objects import lasting_objects
from launch.run_dir import epoch_dir, heartbeats_path, read_config, worker_socket
from launch.stack_dump import install_stack_dumps
from tprt.config import Config
from tprt.errors import TransportError
from tprt.log import configure_logging, get_logger
from tprt.messages import WorkerFailed
from tprt.transport.codec import encode
from tprt.transport.heartbeat import HeartbeatWriter, Phase

if TYPE_CHECKING:
    from launch.devices import RankDevice
    from tprt.distributed import TcpMeeting, TPGroup
    from tprt.transport.channel import WorkerLink

# The end of a traceback says most; a control message has a bound.
_MAX_TRACEBACK = 32_000
_REPORT_S = 1.0


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Where this process stands in its group."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    epoch: int
    run_dir: Path


def read_place() -> WorkerPlace:
    """Read this process's place from the environment."""
    env = os.environ
    return WorkerPlace(
        rank=int(env["RANK"]),
        local_rank=int(env["LOCAL_RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
        epoch=int(env[EPOCH]),
        run_dir=Path(env[RUN_DIR]),
    )


class WorkerProcess:
    """The phases of a rank's life until its model runs."""

    def __init__(self, place: WorkerPlace, config: Config, beat: HeartbeatWriter) -> None:
        self._place = place
        self._config = config
        self._beat = beat
        self._link: WorkerLink | None = None

    def phase(self) -> str:
        """Return the phase that is under way, in words."""
        return self._beat.phase.words

    def report(self, error: Exception) -> None:
        """Tell the coordinator why this rank cannot go on, if it can still be told."""
        if self._link is None:
            return
        trace = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
        name = type(error).__name__
        failed = WorkerFailed(self._place.epoch, self._place.rank, self.phase(), f"{name}: {error}", trace)
        with contextlib.suppress(TransportError):
            self._link.send_control(b"".join(encode(failed)), _REPORT_S)

    def run(self) -> None:
        """Import torch, join the group, load, and run steps until told to stop."""
        with lasting_objects():
            import torch

            from launch.devices import choose_device, prepare_shared_memory, threads_per_rank
            from tprt.checkpoint_config import read_checkpoint_config
            from tprt.weights import join_load_exchange
            from tprt.worker.main import Worker

        place, config = self._place, self._config
        self._beat.set_phase(Phase.START)
        prepare_shared_memory(config.parallel)
        chosen = choose_device(
            config.runtime.device,
            place.local_rank,
            place.local_world_size,
            config.parallel.allow_shared_gpu,
        )
        torch.set_num_threads(config.runtime.num_threads or threads_per_rank(place.local_world_size))
        timeout_s = config.supervision.startup_timeout_s
        link = self._link = connect_link(place, timeout_s)
        self._beat.set_phase(Phase.GROUP_INIT)
        checkpoint = read_checkpoint_config(config.model.path)
        own_dir = epoch_dir(place.run_dir, place.epoch)
        group = self._join_group(
            chosen, str(own_dir) if config.hosts.nnodes == 1 else read_meeting(place.epoch)
        )
        load_socket = str(own_dir / "load.sock")
        exchange = join_load_exchange(load_socket, place.local_rank, place.local_world_size, timeout_s)
        worker = Worker(config, link, place.epoch, self._beat)
        worker.prepare(checkpoint, group, chosen.device, exchange, chosen.num_sharers)
        worker.run()
        link.close()
        group.close()

    def _join_group(self, chosen: RankDevice, meeting: str | TcpMeeting) -> TPGroup:
        import torch

        from launch.cuda_driver import are_gpus_linked
        from launch.devices import cache_folder, choose_all_reduce, is_mps_running
        from tprt.distributed import GroupDeadlines, make_group, tune_all_reduce

        place, supervision = self._place, self._config.supervision
        if chosen.any_shared and place.rank == 0 and not is_mps_running():
            get_logger(__name__).warning(
                "ranks share a GPU and CUDA's MPS daemon is not running: they take turns of milliseconds; start"
                " nvidia-cuda-mps-control -d"
            )
        all_reduce, device_type = self._config.parallel.all_reduce, chosen.device.type
        are_linked = device_type == "cuda" and are_gpus_linked(
            min(place.local_world_size, torch.cuda.device_count())
        )
        group = make_group(
            choose_all_reduce(
                all_reduce, device_type, chosen.any_shared, are_linked, self._config.hosts.nnodes > 1
            ),
            place.rank,
            place.world_size,
            chosen.device,
            meeting,
            GroupDeadlines(supervision.startup_timeout_s, supervision.step_timeout_s),
        )
        tune_all_reduce(group, cache_folder())
        return group


def connect_link(place: WorkerPlace, timeout_s: float) -> WorkerLink:
    """Return this rank's lanes to the coordinator, which is on this host unless there is an address for it.

    Raises:
        TransportError: there is no coordinator there, or it does not want this rank.
    """
    from tprt.transport.link import ShmWorkerLink
    from tprt.transport.remote_link import RemoteWorkerLink

    address, token = os.environ.get(STEPS_ADDRESS), os.environ.pop(STEPS_TOKEN, "").encode()
    who = {"epoch": place.epoch, "rank": place.rank}
    if address is not None:
        return RemoteWorkerLink.connect(address, token=token, timeout_s=timeout_s, **who)
    return ShmWorkerLink.connect(worker_socket(place.run_dir, place.epoch), timeout_s=timeout_s, **who)


def read_meeting(epoch: int) -> TcpMeeting:
    """Return where the ranks of several hosts meet."""
    from tprt.distributed import TcpMeeting

    env = os.environ
    listener = int(env[STORE_FD]) if STORE_FD in env else None
    return TcpMeeting(env["MASTER_ADDR"], int(env["MASTER_PORT"]), epoch, listener)


def open_beat(place: WorkerPlace) -> HeartbeatWriter:
    """Open this rank's heartbeat, or one that nobody sees where whoever started it has made no file."""
    path = heartbeats_path(place.run_dir, place.epoch)
    is_read = path.exists()
    beat = HeartbeatWriter.open(path, place.rank, place.epoch) if is_read else HeartbeatWriter.detached()
    beat.set_phase(Phase.IMPORT)
    return beat


def main() -> None:
    """Run this rank."""
    was_launched = RUN_DIR not in os.environ
    if was_launched:
        # Only here, since a rank that tprt starts needs none of what this imports.
        from launch.torchrun.entry import enter

        enter(sys.argv[1:])
    place = read_place()
    name = f"rank {place.rank}"
    install_stack_dumps(place.run_dir, name)
    beat = open_beat(place)
    config = read_config(place.run_dir)
    configure_logging(config.logging.level, config.logging.format, log_name(name))
    process = WorkerProcess(place, config, beat)

    def report(error: Exception) -> None:
        process.report(error)
        if was_launched:
            from launch.torchrun.entry import give_way

            give_way(error)

    run_child(name, place.run_dir, process.phase, process.run, report)


if __name__ == "__main__":
    main()
