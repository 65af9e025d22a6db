"""The process that runs the checks: `python -m launch.doctor.runner`, with a request on standard input.

It forks a process for every check that needs no torch, imports torch meanwhile, once for all, and forks the
others. What becomes of them goes to standard output, a socket that keeps messages apart, as JSON: the number of
a check with `began`, `ended` or a finding. It touches no device itself, and who started it keeps the time.
"""

from __future__ import annotations

from launch.parent_death import die_with_parent

if __name__ == "__main__":
    # Before the imports below, which take their time.
    die_with_parent()

import json
import os
import select
import signal
import socket
import sys
from dataclasses import replace

from launch.doctor.checks import CHECKS
from launch.doctor.finding import Finding, bad, refused, skipped
from launch.doctor.forked import fork_child
from launch.doctor.request import DoctorRequest
from tprt.errors import TprtError

_STDOUT, _STDERR = 1, 2
_MAX_MESSAGE_BYTES = 65536


class Runner:
    """Starts checks and says what becomes of each."""

    def __init__(self, request: DoctorRequest, out_fd: int) -> None:
        self._request = request
        self._out_fd = out_fd
        # By the pidfd of its process.
        self._running: dict[int, tuple[int, int]] = {}
        self._no_longer_awaited: set[str] = set()
        # The number of a check and the details of the line with which it frees others.
        self._freed, self._free = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def run(self) -> None:
        """Run all checks to their end."""
        for number, check in enumerate(CHECKS):
            if not check.needs_torch:
                self._start(number)
        waiting = [number for number, check in enumerate(CHECKS) if check.needs_torch]
        try:
            import torch  # noqa: F401  # here, so that every process forked below has it
        except Exception as error:  # noqa: BLE001 - a broken library raises anything
            self._give_up(waiting, error)
            waiting = []
        while waiting or self._running:
            for number in [number for number in waiting if self._is_ready(number)]:
                waiting.remove(number)
                self._start(number)
            self._wait_for_news()

    def _give_up(self, numbers: list[int], error: Exception) -> None:
        """Say why no check that needs torch can be made."""
        why = f"torch cannot be imported: {type(error).__name__}: {error}"
        for number in numbers:
            name, advice = CHECKS[number].name, CHECKS[number].advice
            self._say(number, bad(name, why, advice) if name == "torch" else skipped(name, why))
            self._say(number, "ended")

    def _is_ready(self, number: int) -> bool:
        after = CHECKS[number].after
        return not after or after in self._no_longer_awaited or not self._request.expects_cuda

    def _start(self, number: int) -> None:
        self._say(number, "began")
        pid = fork_child(lambda: self._examine(number))
        self._running[os.pidfd_open(pid)] = (pid, number)

    def _examine(self, number: int) -> None:
        """In the process of the check: run it."""
        check = CHECKS[number]
        try:
            for finding in check.load()(self._request):
                self._say(number, finding)
                if finding.check == check.frees:
                    self._free.send(json.dumps([number, finding.to_fields()["details"]]).encode())
        except TprtError as error:
            self._say(number, refused(check.name, error, check.advice))
        except Exception as error:  # noqa: BLE001 - the outermost frame
            self._say(number, bad(check.name, f"failed: {type(error).__name__}: {error}", check.advice))
        self._say(number, "ended")

    def _wait_for_news(self) -> None:
        """Wait until a check has ended or frees others."""
        freed_fd = self._freed.fileno()
        ready = select.select([freed_fd, *self._running], [], [])[0]
        # What a check has told comes before its end.
        if freed_fd in ready:
            number, details = json.loads(self._freed.recv(_MAX_MESSAGE_BYTES))
            self._request = replace(self._request, gpus=details)
            self._no_longer_awaited.add(CHECKS[number].frees)
        for pidfd in set(ready) - {freed_fd}:
            self._take_end(pidfd)

    def _take_end(self, pidfd: int) -> None:
        pid, number = self._running.pop(pidfd)
        os.close(pidfd)
        check, code = CHECKS[number], os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
            self._say(number, bad(check.name, f"the process of this check {how}", check.advice))
            self._say(number, "ended")
        self._no_longer_awaited |= {check.name, check.frees}

    def _say(self, number: int, what: Finding | str) -> None:
        said = what if isinstance(what, str) else what.to_fields()
        os.write(self._out_fd, json.dumps([number, said]).encode())


def main() -> None:
    """Run the checks that standard input asks for."""
    # Else torch initialises CUDA, on all devices, to tell whether there are any.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    request = DoctorRequest.from_json(sys.stdin.read())
    # Libraries may print, and this is for findings.
    out_fd = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Runner(request, out_fd).run()


if __name__ == "__main__":
    main()
