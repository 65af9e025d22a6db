"""A deployment behind `tprt serve`, as a soak sees it: address, processes, their log, what they leave behind.

Knows nothing of what is asked of the server.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from launch.program_end import ProgramEnd
from launch.serving.record import read_server
from scripts.chaos_traces import (
    MARK,
    Lines,
    kill_all,
    living,
    new_shared_memory,
    shared_memory,
    wait_until_gone,
)

_TPRT = Path(sys.executable).parent / "tprt"
_START_S = 120.0
_STOP_S = 60.0
_GONE_S = 5.0
_MODULES = {"launch.serving.entry": "server", "launch.coordinator_entry": "coordinator"}
_RANK = "launch.worker_entry"


class ServedDeployment:
    """One `tprt serve`, on a free port, whose run directory is in a folder of its own.

    From `start` to `close` it also ends with this program, on SIGTERM too.
    """

    def __init__(self, config: str, overrides: Sequence[str]) -> None:
        """Assign only; `start` starts it."""
        settings = [*overrides, "server.port=0"]
        self._command = [str(_TPRT), "serve", config, *(part for one in settings for part in ("--set", one))]
        self._mark = uuid.uuid4().hex
        self._folder = tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp")
        self._shared = shared_memory()
        self._process: subprocess.Popen[str] | None = None
        self._log: Lines | None = None
        self._left: list[str] = []
        self._program_end = ProgramEnd(self.close)

    @property
    def log(self) -> str:
        """What it has said on standard error."""
        return self._log.text if self._log is not None else ""

    def start(self) -> str:
        """Start it; return its address once it listens. Ranks may still be loading then.

        Raises:
            RuntimeError: it has ended, or takes too long.
        """
        self._program_end.guard()
        environment = {**os.environ, MARK: self._mark, "TMPDIR": self._folder.name}
        self._process = subprocess.Popen(
            self._command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        assert self._process.stderr is not None
        self._log = Lines(self._process.stderr)
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            for run_dir in Path(self._folder.name).glob("tprt-*"):
                if (record := read_server(run_dir)) is not None:
                    return record.url
            time.sleep(0.05)
        raise RuntimeError(f"{self._command} does not serve:\n{self.log}")

    def pids(self) -> dict[str, int]:
        """Return the processes by name: `tprt serve`, `server`, `coordinator`, `rank 0`, ..."""
        assert self._process is not None
        found = {"tprt serve": self._process.pid}
        for pid, command in living(self._mark).items():
            module = command.rpartition(" ")[2]
            if module == _RANK:
                found[f"rank {_environment(pid).get('RANK', '?')}"] = pid
            elif module in _MODULES:
                found[_MODULES[module]] = pid
        return found

    def kill_a_rank(self, draw: random.Random) -> str | None:
        """Kill one of the ranks that live; return its name, or None where there is none."""
        ranks = {name: pid for name, pid in sorted(self.pids().items()) if name.startswith("rank")}
        if not ranks:
            return None
        name = draw.choice(list(ranks))
        try:
            os.kill(ranks[name], signal.SIGKILL)
        except ProcessLookupError:
            return None
        return name

    def stop(self) -> int | None:
        """Send SIGTERM; return the exit code, or None if it did not end in time."""
        assert self._process is not None
        assert self._log is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            code: int | None = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            code = None
        processes = wait_until_gone(self._mark, _GONE_S)
        self._left = [f"process {pid}: {command}" for pid, command in processes.items()]
        self._left += [f"file {path}" for path in sorted(Path(self._folder.name).rglob("*"))]
        self._left += [f"/dev/shm/{name}" for name in new_shared_memory(self._shared)]
        self._log.finish()
        return code

    def left_behind(self) -> list[str]:
        """Return the processes, files and shared memory that were there after the end."""
        return self._left

    def close(self) -> None:
        """Kill what is left and remove the folder; idempotent."""
        kill_all(self._mark)
        if self._process is not None:
            self._process.wait()
            # A signal may have come before its output was read.
            if self._log is not None:
                self._log.finish()
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process = None
        self._folder.cleanup()
        self._program_end.release()


def _environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
