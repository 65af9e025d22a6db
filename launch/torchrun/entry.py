"""What a process does that torchrun, or another launcher that sets its variables, has started as a rank.

The first one of a host runs the command: that of node rank 0 starts coordinator, server and its own rank, that
of another host joins it. The others wait until the first one has a place for them, and are ranks. So every host
has a process that never waits in a collective, and whose end is for the launcher the end of all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from launch.child import EPOCH, HOSTS_SECRET, MEETING
from launch.config_file import peek_setting
from launch.exit_codes import leave_with
from launch.parent_death import RUN_DIR
from launch.serving.http_socket import API_KEY
from launch.torchrun.adoption import leave_sigterm_to_first_process, wait_to_be_adopted
from launch.torchrun.place import Place, overrides_of, read_place
from tprt.errors import EngineDeadError, PeerLostError, TprtError

# For the first process of this host to import what it needs and read the settings.
_FIRST_PROCESS_S = 120.0
# For the first process to say what has failed, and for the launcher to end this one.
_GIVE_WAY_S = 10.0
# What `program_end` makes of signals.
_SIGNALLED = (128 + signal.SIGTERM, 128 + signal.SIGHUP)
_SIZE = "parallel.tensor_parallel_size"


def enter(arguments: Sequence[str]) -> None:
    """Run the command and leave, on the first process of a host; on the others return once they are ranks."""
    try:
        place = read_place(os.environ)
        if place.local_rank > 0:
            _become_rank(place)
            return
        command = _make_command(place, arguments)
    except TprtError as error:
        leave_with(error)
    os.environ.update({MEETING: place.meeting, EPOCH: str(place.restart_count)})
    run_command(command)
    sys.exit(0)


def run_command(command: Sequence[str]) -> None:
    """Run a command of `tprt`; a failure is told also where a signal of the launcher comes at the same time."""
    # Only here, since it has all commands and a rank needs none of them.
    from launch.cli import main

    try:
        main(command)
    except SystemExit as end:
        if end.code in _SIGNALLED and (error := _hidden_by(end)) is not None:
            leave_with(error)
        raise


def _hidden_by(end: BaseException) -> TprtError | None:
    """Return the failure that was on its way out when a signal came as `end`: the launcher has seen it too."""
    error: BaseException | None = end
    while error is not None and not isinstance(error, TprtError):
        error = error.__context__
    return error


def give_way(error: Exception) -> None:
    """Wait, on a rank that has failed of `error` and has told so, for the first process of all to say why.

    The launcher ends every process as soon as one has ended, also that which has the cause to tell.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and not isinstance(error, PeerLostError | EngineDeadError):
        _write_error(Path(file), error)
    time.sleep(_GIVE_WAY_S)


def _write_error(file: Path, error: Exception) -> None:
    """Leave what torchrun shows in its table of failures, where it takes the earliest for the cause."""
    trace = "".join(traceback.format_exception(error))
    extra = {"py_callstack": trace, "timestamp": str(int(time.time()))}
    content = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}}
    with contextlib.suppress(OSError):
        file.write_text(json.dumps(content), encoding="utf-8")


def _become_rank(place: Place) -> None:
    # On Ctrl-C only the first process of the host has something to say.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The same environment everywhere is convenient, but a rank needs none of this.
    for name in (HOSTS_SECRET, API_KEY):
        os.environ.pop(name, None)
    os.environ.update(wait_to_be_adopted(place.meeting, f"rank {place.rank}", _FIRST_PROCESS_S))
    leave_sigterm_to_first_process(Path(os.environ[RUN_DIR]))


def _make_command(place: Place, arguments: Sequence[str]) -> list[str]:
    """Return the command line of `tprt` for the first process of a host.

    Raises:
        ConfigError: the settings cannot be read, or do not fit what was started.
    """
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m launch.worker_entry",
        description="A deployment on the processes that torchrun starts, as many as it has ranks.",
    )
    parser.add_argument("--config", required=True, help="YAML file of the deployment")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        help="a command of tprt without its CONFIG: serve (if left out), generate, bench throughput, ...",
    )
    given = parser.parse_args(arguments)
    overrides = overrides_of(place, given.config, given.set)
    size = peek_setting(given.config, given.set, _SIZE, place.world_size)
    if place.rank == 0 and size != place.world_size:
        print(
            f"tprt: {_SIZE} is {place.world_size}, as many as there are processes, and not the {size} of"
            f" {given.config}",
            file=sys.stderr,
        )
    settings = [part for setting in (*given.set, *overrides) for part in ("--set", setting)]
    return [*(given.command or ["serve"]), *settings, "--", given.config]
