"""The process that keeps the other hosts of an epoch: `python -m launch.multihost.keeper_entry`."""

from __future__ import annotations

from launch.job_signals import leave_sigterm_to_parent
from launch.parent_death import RUN_DIR, die_with_parent

if __name__ == "__main__":
    # Before the imports below, which take their time.
    die_with_parent()
    leave_sigterm_to_parent()

import json
import os
import socket
from pathlib import Path

from launch.child import EPOCH, HOSTS_FD, HOSTS_SECRET, STEPS_ADDRESS, run_child
from launch.multihost.door import Door
from launch.multihost.head import NAME
from launch.multihost.identity import make_card
from launch.multihost.keeper import HostKeeper
from launch.run_dir import heartbeats_path, read_config
from launch.stack_dump import install_stack_dumps
from tprt.log import configure_logging
from tprt.transport.heartbeat_relay import BeatImporter


def main() -> None:
    """Keep the hosts."""
    run_dir, epoch = Path(os.environ[RUN_DIR]), int(os.environ[EPOCH])
    install_stack_dumps(run_dir, NAME)
    config = read_config(run_dir)
    configure_logging(config.logging.level, config.logging.format, NAME)
    secret, env = os.environ.pop(HOSTS_SECRET).encode(), json.loads(os.environ[STEPS_ADDRESS])

    def keep() -> None:
        listener = socket.socket(fileno=int(os.environ[HOSTS_FD]))
        door = Door(listener, make_card(config), config.hosts.nnodes, secret)
        HostKeeper(config, BeatImporter(heartbeats_path(run_dir, epoch)), door).run(epoch, env)

    run_child(NAME, run_dir, lambda: "rendezvous", keep)


if __name__ == "__main__":
    main()
