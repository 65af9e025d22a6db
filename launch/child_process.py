"""One child process: how it is started, watched, heard and ended.

It is watched by a pidfd from the moment it is there. Its standard output and standard error come through a
pipe. Knows nothing of what the child does and of other children.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from launch.child_log import SHOWN, ChildLog, LogSink, LogTee
from launch.job_signals import DRAIN_SIGNAL
from launch.parent_death import PARENT_PID

# The kernel may take a while to take a killed process apart: memory of a GPU, a device that does not answer.
_REAP_S = 30.0


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process to start: its name in messages, the module it runs, what it finds and what it inherits.

    Attributes:
        name: "coordinator", "rank 0", "server".
        module: run with `python -m`.
        env: what is in its environment besides that of this process.
        pass_fds: descriptors that it inherits, under the same numbers.
        sink: where its output goes.
        rank: its rank, if it is one.
        is_adopted: torchrun has started it, and it waits for `env`.
    """

    name: str
    module: str
    env: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()
    sink: LogSink = SHOWN
    rank: int | None = None
    is_adopted: bool = False


class ChildProcess:
    """A running child, or one that has ended and has not been released."""

    def __init__(self, spec: ChildSpec, process: subprocess.Popen[bytes], pidfd: int, log: ChildLog) -> None:
        """Use `start`."""
        self.name = spec.name
        self.rank = spec.rank
        self.pidfd = pidfd
        self.log = log
        self._process = process

    @classmethod
    def start(cls, spec: ChildSpec, tee: LogTee) -> ChildProcess:
        """Start a child whose output goes to `tee`.

        Raises:
            OSError: it cannot be started or watched.
        """
        process = subprocess.Popen(
            [sys.executable, "-m", spec.module],
            env={**os.environ, **spec.env, PARENT_PID: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            # This process's standard output is for results; whatever a library prints is log.
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=spec.pass_fds,
            bufsize=0,
            # Ctrl-C in a terminal reaches the parent alone, which then ends its children in order.
            process_group=0,
        )
        assert process.stdout is not None
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            # A child that cannot be watched must not be left to itself.
            process.kill()
            process.wait()
            process.stdout.close()
            raise
        # The log has a descriptor of its own, which it closes when nothing more comes.
        log = ChildLog(os.dup(process.stdout.fileno()), tee, spec.sink)
        process.stdout.close()
        return cls(spec, process, pidfd, log)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it has ended (negative: by that signal), or None while it runs."""
        return self._process.poll()

    def ask_to_end(self) -> None:
        """Send DRAIN_SIGNAL; does not wait."""
        self._send(DRAIN_SIGNAL)

    def kill(self) -> None:
        """End it at once; does not wait."""
        self._send(signal.SIGKILL)

    def wait(self, timeout_s: float) -> None:
        """Wait for its end, `timeout_s` at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def _send(self, number: signal.Signals) -> None:
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def release(self) -> None:
        """Wait for its end, take in its last words and let go of its descriptors; idempotent."""
        self.wait(_REAP_S)
        self.log.read()
        self.log.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.pidfd = -1
