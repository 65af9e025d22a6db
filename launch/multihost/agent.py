"""What runs on a host other than that of node rank 0: it joins, runs its ranks, and joins again when it must.

The host of node rank 0 decides whether there is another group of ranks. Knows nothing of models and requests.
"""

from __future__ import annotations

import contextlib
import os

from launch.child import MEETING
from launch.child_log import LogTee
from launch.job_signals import sigterm_left_to_first_host
from launch.log_dir import make_log_dir
from launch.multihost.epoch_on_host import EpochOnHost
from launch.multihost.frames import FrameLane
from launch.multihost.identity import make_card, steps_token, take_secret
from launch.multihost.join import join
from launch.multihost.network import choose_interface
from launch.multihost.news import pack_cause
from launch.program_end import ProgramEnd
from launch.run_dir import RunDir, adopts_ranks, write_config
from launch.serving.http_socket import API_KEY
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import Config, split_endpoint
from tprt.errors import EngineDeadError
from tprt.log import configure_logging, tell

_DRAIN_S = 1.0


def run_agent(config: Config) -> None:
    """Take part in a deployment until it ends in order.

    Raises:
        ConfigError, CheckpointError: this host cannot take part; says why.
        EngineDeadError: a group of ranks that this host cannot start again has ended.
        TransportTimeoutError: node rank 0 did not answer in `hosts.join_timeout_s`.
    """
    configure_logging(config.logging.level, config.logging.format, f"node rank {config.hosts.node_rank}")
    # The same environment everywhere is convenient, but there is no server here.
    os.environ.pop(API_KEY, None)
    read_checkpoint_config(config.model.path)
    agent = Agent(config)
    end = ProgramEnd(agent.close)
    end.guard()
    try:
        agent.run()
    finally:
        agent.close()
        end.release()


class Agent:
    """This host's part, over all epochs."""

    def __init__(self, config: Config) -> None:
        """Check what can be checked without node rank 0."""
        make_log_dir(config.logging)
        self._config = config
        self._secret = take_secret(config.hosts)
        self._token = steps_token(self._secret, config.hosts)
        self._card = make_card(config)
        self._tee = LogTee()
        self._run_dir = RunDir.create(name=os.environ.pop(MEETING, None))
        write_config(self._run_dir.path, config)

    def run(self) -> None:
        """Join until the ranks have ended as they should; see `run_agent` for what is raised."""
        hosts = self._config.hosts
        assert hosts.rdzv_endpoint is not None
        host, port = split_endpoint(hosts.rdzv_endpoint)
        self._say(f"joining {host}, port {port}")
        while True:
            lane = join(host, port, self._card, self._secret, hosts.join_timeout_s)
            with contextlib.closing(lane), sigterm_left_to_first_host():
                why = self._take_part(lane)
            if not why:
                self._say("the deployment has ended")
                return
            if adopts_ranks(self._run_dir.path):
                # Whoever has started the ranks starts them again, and this process with them.
                raise EngineDeadError(f"node rank {hosts.node_rank}: {why}")
            self._say(f"{why}; joining again")

    def close(self) -> None:
        """Remove what this host has of the deployment; idempotent."""
        self._tee.drain(_DRAIN_S)
        self._run_dir.remove()

    def _take_part(self, lane: FrameLane) -> str:
        """Run the ranks of one epoch; return why it has not ended in order, empty if it has."""
        config = self._config
        interface = choose_interface(config.hosts, lane.connection.getsockname()[0])
        ranks = ", ".join(map(str, config.ranks_of(config.hosts.node_rank)))
        self._say(f"has joined with ranks {ranks}; ranks use interface {interface}")
        own = {"interface": interface, "token": self._token}
        epoch = EpochOnHost(config, self._run_dir.path, lane, self._tee, own)
        try:
            return epoch.run()
        except (SystemExit, KeyboardInterrupt):
            lane.send(pack_cause(epoch.why_told_to_end()))
            raise
        finally:
            epoch.end()

    def _say(self, text: str) -> None:
        tell(f"node rank {self._config.hosts.node_rank}: {text}")
