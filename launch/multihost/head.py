"""What the launcher on the host of node rank 0 holds for the other hosts: three sockets, as long as it lives.

One is where hosts come in, at `hosts.rdzv_endpoint`. The other two have ports that the system chose: one takes
the steps of ranks on other hosts, one is for the store where ranks meet. Children inherit them, epoch after
epoch, so no port is free in between. Knows nothing of processes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.child import EPOCH, HOSTS_FD, HOSTS_SECRET, STEPS_ADDRESS, STEPS_FD, STEPS_TOKEN, STORE_FD
from launch.child_process import ChildSpec
from launch.log_dir import sink_of
from launch.multihost.identity import steps_token, take_secret
from launch.multihost.network import choose_interface, listen, listen_on
from launch.parent_death import RUN_DIR
from tprt.config import Config
from tprt.errors import ConfigError
from tprt.log import tell
from tprt.transport.remote_wire import join_address

NAME = "rendezvous"


class Head:
    """The sockets, and what children need to know of them.

    Attributes:
        interface: the network interface for what goes between ranks.
    """

    def __init__(self, config: Config) -> None:
        """Open the sockets.

        Raises:
            ConfigError: there is no secret, or no socket at the endpoint.
        """
        self._config = config
        self._secret = take_secret(config.hosts)
        with contextlib.ExitStack() as cleanup:
            self._door = cleanup.enter_context(listen(config.hosts))
            self._address: str = self._door.getsockname()[0]
            self._steps = cleanup.enter_context(listen_on(self._address, 0))
            self._store = cleanup.enter_context(listen_on(self._address, 0))
            self.interface = choose_interface(config.hosts, self._address)
            self._cleanup = cleanup.pop_all()

    def announce(self) -> None:
        """Tell people where the other hosts are waited for."""
        hosts = self._config.hosts
        port = self._door.getsockname()[1]
        tell(
            f"node rank 0 of {hosts.nnodes} waits for the others at {self._address}, port {port};"
            f" ranks use interface {self.interface}"
        )

    def equip_coordinator(self, spec: ChildSpec) -> ChildSpec:
        """Return `spec` with the socket for the steps of other hosts' ranks."""
        fd, token = self._steps.fileno(), steps_token(self._secret, self._config.hosts)
        env = {**spec.env, STEPS_FD: str(fd), STEPS_TOKEN: token}
        return replace(spec, env=env, pass_fds=(*spec.pass_fds, fd))

    def equip_group(self, specs: Sequence[ChildSpec], run_dir: Path, epoch: int) -> list[ChildSpec]:
        """Return the ranks of this host with the store, and the process that keeps the other hosts."""
        meeting = {"MASTER_ADDR": self._address, "MASTER_PORT": str(self._store.getsockname()[1])}
        ranks = [replace(spec, env={**spec.env, **meeting}) for spec in specs]
        fd = self._store.fileno()
        ranks[0] = replace(ranks[0], env={**ranks[0].env, STORE_FD: str(fd)}, pass_fds=(fd,))
        return [*ranks, self._make_keeper(meeting, run_dir, epoch)]

    def close(self) -> None:
        """Close the sockets; idempotent."""
        self._cleanup.close()

    def _make_keeper(self, meeting: Mapping[str, str], run_dir: Path, epoch: int) -> ChildSpec:
        fd = self._door.fileno()
        start = {STEPS_ADDRESS: join_address(*self._steps.getsockname()[:2]), **meeting}
        env = {
            RUN_DIR: str(run_dir),
            EPOCH: str(epoch),
            HOSTS_FD: str(fd),
            HOSTS_SECRET: self._secret.decode(),
            STEPS_ADDRESS: json.dumps(start),
        }
        return ChildSpec(NAME, "launch.multihost.keeper_entry", env, (fd,), sink_of(NAME, self._config.logging))


def open_head(config: Config) -> Head | None:
    """Return what node rank 0 holds for other hosts; None where there are none.

    Raises:
        ConfigError: this is not the host of node rank 0, or see `Head`.
    """
    if config.hosts.node_rank != 0:
        raise ConfigError(
            f"hosts.node_rank is {config.hosts.node_rank}: a deployment is started on node rank 0, and the"
            " other hosts join it with tprt serve, generate or bench"
        )
    return None if config.hosts.nnodes == 1 else Head(config)
