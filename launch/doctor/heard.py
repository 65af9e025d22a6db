"""What a process that takes steps says of them, and what is to be thought of those that have not ended.

A sound machine may be slow: it is a warning if time ran out, unless a step stands still whose like have ended.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from launch.doctor.finding import Finding, bad, skipped, warning
from launch.doctor.forked import end_children, fork_child
from launch.doctor.gpu_work import Failure, Step
from launch.doctor.leftovers import removing_files_of

# No sound device needs so much longer than its like, nor any step so long.
_STANDS_STILL_S, _HANGS_S = 3.0, 30.0
_MORE_TIME = "try again with --timeout-s 60; if it stays so: "
_WORDS = {
    "driver": "initialising the driver",
    "open": "opening device {}",
    "compute": "a kernel on device {}",
    "copy": "the copy from device {} to {}",
    "nccl": "loading NCCL",
    "sum": "the sum over {} devices by NCCL",
}


class Heard:
    """Results of steps, as far as they have been heard.

    Attributes:
        results: of each step that has ended; a Failure where it could not be done.
    """

    def __init__(self, pid: int, connection: Connection, end_s: float) -> None:
        """Hear from the process `pid` until `end_s` on the monotonic clock."""
        self._pid, self._connection, self._end_s = pid, connection, end_s
        self._began_s: dict[Step, float] = {}
        self._ended_s: dict[Step, float] = {}
        self._death = ""
        self._listens_since_s = time.monotonic()
        self.results: dict[Step, Any] = {}

    def result(self, step: Step) -> Any:
        """Wait for a step and return its result; None if there is none."""
        self.wait_for([step])
        return self.results.get(step)

    def wait_for(self, steps: Sequence[Step]) -> None:
        """Listen until all these steps have ended, or nothing more will come."""
        while not self._death and any(step not in self.results for step in steps):
            if not self._connection.poll(max(0.0, self._end_s - time.monotonic())):
                return
            try:
                step, result = self._connection.recv()
            except EOFError:
                code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                self._death = f"signal {-code}" if code < 0 else f"exit code {code}"
                return
            if result is None:
                self._began_s[step] = time.monotonic()
            else:
                self._ended_s[step], self.results[step] = time.monotonic(), result

    def seconds(self, steps: Sequence[Step]) -> float:
        """Return how long it took from the beginning of the first of these to the end of the last."""
        took = max(self._ended_s[step] for step in steps) - min(self._began_s[step] for step in steps)
        return round(took, 3)

    def problem(self, name: str, steps: Sequence[Step], fix: str) -> Finding | None:
        """Wait for these steps, which are alike, and return what is wrong; None if each has a result."""
        self.wait_for(steps)
        failed = {step: said for step in steps if isinstance(said := self.results.get(step), Failure)}
        waiting = [step for step in steps if step not in self.results]
        if failed:
            text = "; ".join(f"{_words(step)}: {said.text}" for step, said in failed.items())
            is_untried = all(said.is_missing for said in failed.values())
            return skipped(name, f"cannot be tried: {text}") if is_untried else bad(name, text, fix)
        if not waiting:
            return None
        under_way = [step for step in self._began_s if step not in self.results]
        doing = ", ".join(map(self._so_far, under_way)) or "nothing was begun"
        if self._death:
            return bad(name, f"the process that tries the devices ended by {self._death}: {doing}", fix)
        if hung := self._standing_still(steps, under_way):
            answered = f"; {len(steps) - len(waiting)} like it ended" if len(steps) > len(waiting) else ""
            return bad(name, f"no answer: {', '.join(map(self._so_far, hung))}{answered}", fix)
        given_s = self._end_s - self._listens_since_s
        return warning(name, f"{given_s:.1f} s were not enough: {doing}", _MORE_TIME + fix)

    def _standing_still(self, steps: Sequence[Step], under_way: Sequence[Step]) -> list[Step]:
        """Return which of `steps` will not end: nothing was heard of them or their like for long."""
        ended_s = [self._ended_s[step] for step in steps if step in self.results]
        most_s = _STANDS_STILL_S if ended_s else _HANGS_S
        since_s = time.monotonic() - most_s
        if max(ended_s, default=0.0) > since_s:
            return []
        return [step for step in steps if step in under_way and self._began_s[step] <= since_s]

    def _so_far(self, step: Step) -> str:
        return f"{_words(step)} for {time.monotonic() - self._began_s[step]:.1f} s"


@contextlib.contextmanager
def listening_to(body: Callable[[Connection], None], end_s: float) -> Iterator[Heard]:
    """Run `body` in a process of its own, which ends with the block, and hear what it says until `end_s`."""
    connection, theirs = Pipe(duplex=False)
    with connection:
        with theirs:
            pid = fork_child(lambda: body(theirs))
        try:
            yield Heard(pid, connection, end_s)
        finally:
            with removing_files_of([pid]):
                end_children([pid])


def _words(step: Step) -> str:
    return _WORDS[step.kind].format(*step.numbers)
