"""Runs all checks within a deadline, whatever becomes of them. Knows nothing of what they look at."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from launch.doctor.checks import CHECKS, Check
from launch.doctor.finding import Finding, bad, silent, skipped, warning
from launch.doctor.leftovers import members_of, removing_files_of
from launch.doctor.request import DoctorRequest
from launch.parent_death import PARENT_PID
from launch.run_dir import remove_abandoned

_MAX_MESSAGE_BYTES = 65536
_GONE_S, _BETWEEN_LOOKS_S = 0.5, 0.005
_PR_SET_CHILD_SUBREAPER = 36
_MORE_TIME = "try again with --timeout-s 60"
_SLOW_TORCH = (
    "try again: the second import is from memory; on a machine this slow raise supervision.startup_timeout_s,"
    " and put the Python environment on a local disk"
)


class Results:
    """What has been heard of each check."""

    def __init__(self, is_on_gpus: bool = False) -> None:
        """`is_on_gpus`: ranks compute on CUDA devices, which some checks wait for."""
        self._is_on_gpus = is_on_gpus
        self._began: set[int] = set()
        self._ended: set[int] = set()
        self._findings: dict[int, list[Finding]] = {}

    def hear(self, message: bytes) -> None:
        """Take in one message of the runner."""
        number, what = json.loads(message)
        if what == "began":
            self._began.add(number)
        elif what == "ended":
            self._ended.add(number)
        else:
            self._findings.setdefault(number, []).append(Finding.from_fields(what))

    def findings(self, end: str, has_crashed: bool) -> list[Finding]:
        """Return all findings in the order of the checks.

        Args:
            end: why nothing more will come.
            has_crashed: the runner did, which does nothing but import torch and fork.
        """
        found: list[Finding] = []
        for number, check in enumerate(CHECKS):
            heard = self._findings.get(number, [])
            found += heard
            if number in self._ended:
                continue
            if has_crashed and check.name == "torch":
                found.append(bad(check.name, end, check.advice))
            elif has_crashed:
                # It was cut short through no fault of its own.
                found += [] if heard else [skipped(check.name, end)]
            elif number in self._began:
                is_partial = any(finding.check == check.name for finding in heard)
                name = f"rest of {check.name}" if is_partial else check.name
                if self._is_on_gpus and check.after:
                    found.append(warning(name, f"was not done yet: {end}", f"{_MORE_TIME}; {check.advice}"))
                else:
                    found.append(silent(name, f"gave no answer: {end}", check.advice))
            else:
                found.append(self._not_begun(check, end))
        return found

    def _not_begun(self, check: Check, end: str) -> Finding:
        if check.name == "torch":
            return warning(check.name, f"was not imported yet: {end}", _SLOW_TORCH)
        if not check.needs_torch:
            return skipped(check.name, f"was not begun yet: {end}")
        has_torch = any(CHECKS[number].name == "torch" for number in self._began)
        awaited = f"the check of {check.after}" if has_torch else "the import of torch"
        return skipped(check.name, f"waited for {awaited}: {end}")


def examine(request: DoctorRequest) -> list[Finding]:
    """Run every check side by side and return what they found, by `request.end_s`."""
    results = Results(request.expects_cuda)
    began_s = time.monotonic()
    with _adopting(), _runner(request) as (runner, channel):
        has_ended = _hear_all(results, runner, channel, request.end_s)
    if not has_ended:
        return results.findings(f"{time.monotonic() - began_s:.1f} s were over", has_crashed=False)
    code = runner.returncode
    how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
    return results.findings(f"the process that imports torch {how}", has_crashed=bool(code))


@contextlib.contextmanager
def _runner(request: DoctorRequest) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """Start the runner; at the end it and all that it has started, and what they left, are gone."""
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with channel, theirs:
        runner = subprocess.Popen(
            [sys.executable, "-m", "launch.doctor.runner"],
            env={**os.environ, PARENT_PID: str(os.getpid())},
            stdin=subprocess.PIPE,
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # One group for all, which Ctrl-C does not reach and which can be ended as one.
            process_group=0,
        )
        theirs.close()
        try:
            assert runner.stdin is not None
            with contextlib.suppress(BrokenPipeError), runner.stdin:
                runner.stdin.write(request.to_json().encode())
            yield runner, channel
        finally:
            with removing_files_of(members_of(runner.pid)):
                _end_group(runner)
            remove_abandoned()


def _hear_all(results: Results, runner: subprocess.Popen[bytes], channel: socket.socket, end_s: float) -> bool:
    """Take in what comes until the runner has ended (True) or it is `end_s` (False)."""
    pidfd = os.pidfd_open(runner.pid)
    watched = {channel.fileno(), pidfd}
    try:
        while (left_s := end_s - time.monotonic()) > 0:
            ready = select.select(watched, [], [], left_s)[0]
            if channel.fileno() in ready:
                if message := channel.recv(_MAX_MESSAGE_BYTES):
                    results.hear(message)
                else:
                    # All ends of it are closed, so the end of the runner is near.
                    watched = {pidfd}
            elif pidfd in ready:
                return True
        return False
    finally:
        os.close(pidfd)


def _end_group(runner: subprocess.Popen[bytes]) -> None:
    """Kill the runner and its descendants, and wait until they are gone; a driver may hold on to one."""
    deadline_s = time.monotonic() + _GONE_S
    # It has not been waited for, so the group's number is still its own.
    os.killpg(runner.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        runner.wait(_GONE_S)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-runner.pid, os.WNOHANG)[0] or time.monotonic() < deadline_s:
            time.sleep(_BETWEEN_LOOKS_S)


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Become the parent of descendants whose own has died, so that their end can be waited for."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)
