"""`tprt stop`: asks running deployments of this user to end, and waits until they have."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from launch.run_dir import find_config, living_run_dirs, open_owner
from launch.status_command import EXIT_NONE_FOUND, NONE_FOUND
from tprt.config import ServerConfig, SupervisionConfig
from tprt.errors import ConfigError, TprtError

# After its own deadlines a deployment takes this long at most to be gone.
_MARGIN_S = 5.0
# Two signals at the same instant are one.
_BETWEEN_SIGNALS_S = 0.3

DeploymentsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN_DIR]...", help="Which, as `tprt status` names them; the last part of the path will do."
    ),
]
AllOption = Annotated[bool, typer.Option("--all", help="Stop every deployment of this user.")]
NowOption = Annotated[bool, typer.Option("--now", help="Do not wait for the requests that are running.")]


def stop(deployments: DeploymentsArgument = None, stop_all: AllOption = False, now: NowOption = False) -> None:
    """Stop running deployments of this user on this host, and wait until they have ended.

    A server takes no new requests and finishes those that are running, for server.drain_timeout_s at most.
    Without RUN_DIR the only deployment is stopped.

    Exit code: 0 when all have ended, 1 when one has not, 2 when it is not clear which one is meant, 3 when
    there is none.
    """
    running = living_run_dirs()
    if not running:
        print(NONE_FOUND)
        raise typer.Exit(EXIT_NONE_FOUND)
    chosen = running if stop_all else _choose(running, deployments or [])
    with contextlib.ExitStack() as stack:
        owners = [_Owner(run_dir) for run_dir in chosen]
        for owner in owners:
            stack.callback(owner.close)
        for owner in owners:
            owner.signal()
        if now:
            time.sleep(_BETWEEN_SIGNALS_S)
            for owner in owners:
                owner.signal()
        for owner in owners:
            owner.wait()


def _choose(running: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Return the run directories that `names` stand for; without names, the only one.

    Raises:
        ConfigError: a name stands for none, or without names there are several.
    """
    listed = "".join(f"\n  {path}  {_settings(path)[0]}" for path in running)
    if not names and len(running) > 1:
        raise ConfigError(f"{len(running)} deployments are running; name those to stop, or give --all:{listed}")
    if unknown := [name for name in names if not any(name in (str(path), path.name) for path in running)]:
        raise ConfigError(f"{', '.join(unknown)}: no such deployment; running are:{listed}")
    return [path for path in running if not names or str(path) in names or path.name in names]


def _settings(run_dir: Path) -> tuple[str, ServerConfig, SupervisionConfig]:
    """Return the model of a deployment and what tells how long its end may take."""
    config = find_config(run_dir)
    if config is None:
        return "unknown", ServerConfig(), SupervisionConfig()
    return config.model.path, config.server, config.supervision


class _Owner:
    """The process that a deployment belongs to: its end is the end of all of it."""

    def __init__(self, run_dir: Path) -> None:
        """Find it.

        Raises:
            TprtError: it cannot be seen from here.
        """
        self._run_dir = run_dir
        self._model, server, supervision = _settings(run_dir)
        self._drain_s = server.drain_timeout_s + supervision.shutdown_grace_s + _MARGIN_S
        self._grace_s = supervision.shutdown_grace_s + _MARGIN_S
        owner = open_owner(run_dir)
        if owner is None:
            raise TprtError(
                f"the process that {run_dir} belongs to cannot be seen from here: it has just ended, or runs in"
                " another container; stop it there"
            )
        self._pid, self._pidfd = owner

    def close(self) -> None:
        os.close(self._pidfd)

    def signal(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def wait(self) -> None:
        """Wait for its end; ask again, which ends it at once, when it takes longer than it may.

        Raises:
            TprtError: it does not end.
        """
        if not self._ends_within(self._drain_s):
            self.signal()
            if not self._ends_within(self._grace_s):
                waited_s = self._drain_s + self._grace_s
                raise TprtError(
                    f"{self._run_dir} (pid {self._pid}) has not ended {waited_s:g} s after it was asked to;"
                    f" kill -KILL {self._pid} takes all its processes with it"
                )
        print(f"{self._run_dir}: {self._model}: stopped")

    def _ends_within(self, timeout_s: float) -> bool:
        return bool(select.select([self._pidfd], [], [], timeout_s)[0])
