"""Starts the processes of a deployment, sees the death of each, and ends them all.

Children are watched by pidfds from the moment they are started. The first unexpected death ends the whole
deployment: the others are killed from outside, since a rank that waits in a collective cannot be asked. The
thread that starts the children lives as long as they do, because their parent-death signal is tied to it.
Knows nothing of models and messages.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.child import PARENT_PID
from launch.failure import Death, describe, first_cause, read_failure
from tprt.errors import EngineDeadError

# Deaths within this time of the first are looked at together when the cause is chosen.
_GATHER_S = 0.1
_STDERR = 2


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process to start: its name in messages, the module it runs, and what it finds in its environment."""

    name: str
    module: str
    env: Mapping[str, str]


class Supervisor:
    """The children of one deployment."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._children: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
        self._started = threading.Event()
        self._stop_asked = False
        self._grace_s = 0.0
        self._failure: str | None = None
        self._explained = threading.Event()
        self._stop_fd = -1
        self._thread: threading.Thread | None = None

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {name: child.pid for name, child in self._children.values()}

    def start(self, specs: Sequence[ChildSpec]) -> None:
        """Start all children and begin to watch them.

        Raises:
            EngineDeadError: one could not be started; says which and why.
        """
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, args=(specs,), name="tprt-supervisor", daemon=True)
        self._thread.start()
        self._started.wait()
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Raise the first cause if the deployment has failed.

        Raises:
            EngineDeadError: says which process died where of what, with its traceback.
        """
        if self._failure is not None:
            raise EngineDeadError(self._failure)

    def wait_for_failure(self, timeout_s: float) -> None:
        """Wait until a failure has been explained, `timeout_s` at most."""
        self._explained.wait(timeout_s)

    def stop(self, grace_s: float) -> None:
        """Wait `grace_s` for the children to end, kill those that do not.

        Idempotent; may be called again with less grace when a first call was interrupted.
        """
        if self._thread is None:
            return
        self._grace_s = grace_s
        self._stop_asked = True
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        self._thread = None
        os.close(self._stop_fd)

    def _watch(self, specs: Sequence[ChildSpec]) -> None:
        try:
            self._spawn_all(specs)
            if self._failure is None:
                self._wait_for_ends()
        except BaseException:
            self._failure = "the supervisor of the processes failed; its traceback is above"
            raise
        finally:
            self._explained.set()
            self._started.set()
            self._kill_all()

    def _spawn_all(self, specs: Sequence[ChildSpec]) -> None:
        for spec in specs:
            try:
                self._spawn(spec)
            except OSError as error:
                self._failure = f"{spec.name} could not be started with {sys.executable}: {error}"
                return
        self._started.set()

    def _spawn(self, spec: ChildSpec) -> None:
        environment = {**os.environ, **spec.env, PARENT_PID: str(os.getpid())}
        child = subprocess.Popen(
            [sys.executable, "-m", spec.module],
            env=environment,
            stdin=subprocess.DEVNULL,
            # Standard output is for results; whatever a library prints goes to standard error.
            stdout=_STDERR,
            # Ctrl-C in a terminal reaches the parent alone, which then ends its children in order.
            process_group=0,
        )
        try:
            pidfd = os.pidfd_open(child.pid)
        except OSError:
            # A child that cannot be watched must not be left to itself.
            child.kill()
            child.wait()
            raise
        self._children[pidfd] = (spec.name, child)

    def _wait_for_ends(self) -> None:
        """Return when all children have ended, or one has failed, or the grace after `stop` is over."""
        poller = select.poll()
        for pidfd in (*self._children, self._stop_fd):
            poller.register(pidfd, select.POLLIN)
        alive, deadline_s = set(self._children), float("inf")
        while alive and time.monotonic() < deadline_s:
            wait_ms = None if deadline_s == float("inf") else max(0.0, deadline_s - time.monotonic()) * 1000
            ready = {fd for fd, _ in poller.poll(wait_ms)}
            if self._stop_fd in ready:
                os.eventfd_read(self._stop_fd)
                deadline_s = time.monotonic() + self._grace_s
            for pidfd in ready & alive:
                poller.unregister(pidfd)
            alive -= ready
            if ready & self._children.keys() and not self._stop_asked:
                self._failure = self._explain()
                return

    def _explain(self) -> str:
        """Choose the first cause among all that die about now."""
        time.sleep(_GATHER_S)
        deaths = [
            Death(name, child.pid, code, read_failure(self._run_dir, name))
            for name, child in self._children.values()
            if (code := child.poll()) is not None
        ]
        return describe(first_cause(deaths))

    def _kill_all(self) -> None:
        for _, child in self._children.values():
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(signal.SIGKILL)
        for pidfd, (_, child) in self._children.items():
            child.wait()
            os.close(pidfd)
