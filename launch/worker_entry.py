"""The process of one rank: `python -m launch.worker_entry`, started by tprt or by torchrun.

Reads RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE as torchrun sets them, and the run directory and
epoch from variables of tprt's own.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.child import EPOCH, RUN_DIR, die_with_parent, run_child
from launch.run_dir import read_config, worker_socket
from tprt.config import Config
from tprt.errors import TransportError
from tprt.log import configure_logging
from tprt.messages import WorkerFailed
from tprt.transport.codec import encode

if TYPE_CHECKING:
    from tprt.transport.channel import WorkerLink
    from tprt.worker.main import Worker

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
    """The stages of a rank's life, with the name of the one it is in."""

    def __init__(self, place: WorkerPlace, config: Config) -> None:
        self._place = place
        self._config = config
        self._phase = "import"
        self._worker: Worker | None = None
        self._link: WorkerLink | None = None

    def phase(self) -> str:
        """Return the stage that is under way."""
        return self._phase if self._worker is None else self._worker.phase

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
        import torch

        from launch.devices import choose_all_reduce, choose_device, threads_per_rank
        from tprt.checkpoint_config import read_checkpoint_config
        from tprt.distributed import make_group
        from tprt.transport.link import ShmWorkerLink
        from tprt.worker.main import Worker

        place, config = self._place, self._config
        self._phase = "start"
        device = choose_device(config.runtime.device, place.local_rank)
        torch.set_num_threads(config.runtime.num_threads or threads_per_rank(place.local_world_size))
        timeout_s = config.supervision.startup_timeout_s
        socket = worker_socket(place.run_dir, place.epoch)
        link = ShmWorkerLink.connect(socket, epoch=place.epoch, rank=place.rank, timeout_s=timeout_s)
        self._link = link
        self._phase = "process-group init"
        checkpoint = read_checkpoint_config(config.model.path)
        group = make_group(
            choose_all_reduce(config.parallel.all_reduce, device),
            place.rank,
            place.world_size,
            device,
            str(place.run_dir),
            config.supervision.step_timeout_s,
        )
        self._worker = worker = Worker(config, link, place.epoch)
        worker.prepare(checkpoint, group, device)
        worker.run()
        link.close()
        group.close()


def main() -> None:
    """Run this rank."""
    die_with_parent()
    place = read_place()
    config = read_config(place.run_dir)
    name = f"rank {place.rank}"
    configure_logging(config.logging.level, config.logging.format, name)
    process = WorkerProcess(place, config)
    run_child(name, place.run_dir, process.phase, process.run, process.report)


if __name__ == "__main__":
    main()
