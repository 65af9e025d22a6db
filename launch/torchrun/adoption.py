"""How a rank that torchrun has started gets the environment that its place in the deployment needs.

The first process of a host makes the run directory and leaves the environment of each other rank there. Nobody
but this user can enter it, and one that belongs to somebody else is not looked at. Knows nothing of what is in
an environment.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from launch.child_process import ChildSpec
from launch.job_signals import reach_all_processes
from launch.run_dir import find_named, owner_lives
from tprt.errors import EngineDeadError, TransportTimeoutError

_LOOK_S = 0.05
# For a rank to end in order.
_END_S = 2.0


def adopt(run_dir: Path, spec: ChildSpec) -> None:
    """Let the rank of `spec` begin.

    Raises:
        OSError: its environment cannot be written.
    """
    path = _path(run_dir, spec.name)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(dict(spec.env)), encoding="utf-8")
    draft.rename(path)


def wait_to_be_adopted(meeting: str, name: str, timeout_s: float) -> Mapping[str, str]:
    """Return the environment of process `name`.

    Args:
        meeting: name of the run directory.
        name: "rank 1".
        timeout_s: for the directory to be made. How long the environment may take is for its owner to watch.

    Raises:
        TransportTimeoutError: there is no such directory in time.
        EngineDeadError: its owner has ended.
    """
    run_dir = _wait_for_run_dir(meeting, timeout_s)
    path = _path(run_dir, name)
    while not path.exists():
        if not owner_lives(run_dir):
            raise EngineDeadError("the first process of this host has ended before this rank could begin")
        time.sleep(_LOOK_S)
    content: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return content


def leave_sigterm_to_first_process(run_dir: Path) -> None:
    """End this rank on SIGTERM only after the first process of its host, where that one gets the signal too.

    So the first one can let requests finish, or say what has failed, and is not told of this rank's end.
    """
    if reach_all_processes():
        # The main thread may be in C code for as long as it lives, and is not interrupted there.
        noted, note = os.pipe()
        os.set_blocking(note, False)
        signal.set_wakeup_fd(note)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.siginterrupt(signal.SIGTERM, False)
        threading.Thread(target=_outlive_owner, args=(run_dir, noted), name="tprt-sigterm", daemon=True).start()


def _outlive_owner(run_dir: Path, noted: int) -> None:
    os.read(noted, 1)
    while owner_lives(run_dir):
        time.sleep(_LOOK_S)
    # Asked by the coordinator it ends by itself; where something has failed it may wait in a collective.
    time.sleep(_END_S)
    os._exit(128 + signal.SIGTERM)


def _wait_for_run_dir(meeting: str, timeout_s: float) -> Path:
    deadline_s = time.monotonic() + timeout_s
    while (run_dir := find_named(meeting)) is None:
        if time.monotonic() > deadline_s:
            raise TransportTimeoutError(
                f"the first process of this host (LOCAL_RANK 0) has made no run directory in {timeout_s:g} s;"
                " give all processes of a host the same TMPDIR, MASTER_ADDR and MASTER_PORT"
            )
        time.sleep(_LOOK_S)
    return run_dir


def _path(run_dir: Path, name: str) -> Path:
    return run_dir / f"environment-{name.replace(' ', '-')}.json"
