"""Runs one cell of the chaos matrix: starts a deployment, hurts a process, and looks at what comes of it.

Every wait has a deadline, and whatever is still there at the end is killed. Knows nothing of other cells.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scripts.chaos_matrix import Cell, Fault, Outcome, cause_pattern, outcome_of
from scripts.chaos_plan import environment, is_from_outside
from scripts.chaos_target import Target
from scripts.chaos_traces import (
    MARK,
    Lines,
    kill_all,
    new_shared_memory,
    shared_memory,
    wait_until_gone,
)
from tprt.transport.heartbeat import Phase

_ROOT = Path(__file__).resolve().parents[1]
# Longer than any deadline of the deployment; a cell that takes longer hangs.
DEADLINE_S = 90.0
_GONE_S = 5.0
_STOPPED_S = 3.0
_NOTICED_WHILE_IDLE_S = 3.0
_BY_SIGNAL = (Fault.EXCEPTION, Fault.MEMORY_ERROR, Fault.EXIT)


@dataclass(slots=True)
class Seen:
    """What was seen of one cell."""

    detection_s: float | None = None
    line: str = ""
    exit_code: int | None = None
    tokens: list[list[int]] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failure: str = ""
    log: str = ""


class CellFailedError(Exception):
    """Something has not come before the deadline of the cell, or can never come."""


class CellRun:
    """One deployment with one fault."""

    def __init__(self, cell: Cell, target: Target, folder: Path, deadline_s: float) -> None:
        self._cell = cell
        self._target = target
        self._notes = folder / "notes"
        self._temporary = folder / "t"
        self._mark = folder.name
        self._started_s = time.monotonic()
        self._deadline_s = self._started_s + deadline_s
        self._process: subprocess.Popen[str]
        self._errors: Lines
        self._output: Lines

    def run(self) -> Seen:
        """Do it all; never raises for what the deployment does."""
        shared, seen = shared_memory(), Seen()
        self._start()
        try:
            self._hurt_and_watch(seen)
        except CellFailedError as error:
            seen.failure = str(error)
            self._process.kill()
        finally:
            left = wait_until_gone(self._mark, _GONE_S)
            seen.survivors = sorted(left.values())
            kill_all(self._mark)
        self._process.wait()
        self._errors.finish()
        self._output.finish()
        seen.leftovers = [*self._files_left(), *(f"/dev/shm/{name}" for name in new_shared_memory(shared))]
        seen.tokens = [json.loads(line)["token_ids"] for _, line in self._output.found if line.startswith("{")]
        seen.seconds, seen.log = time.monotonic() - self._started_s, self._errors.text
        return seen

    # From the start to the fault.

    def _start(self) -> None:
        self._notes.mkdir()
        self._temporary.mkdir()
        is_idle = self._cell.phase is Phase.IDLE
        command = self._target.idling_command(self._notes) if is_idle else self._target.command()
        variables = {**environment(self._cell, self._notes), "TMPDIR": str(self._temporary), MARK: self._mark}
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._output, self._errors = Lines(self._process.stdout), Lines(self._process.stderr)

    def _fault_from_outside(self) -> None:
        self._wait_for_note("reached", "the phase has not been reached")
        pid = self._victims_pid()
        fault = self._cell.fault
        number = (
            signal.SIGRTMIN + _BY_SIGNAL.index(fault) if fault in _BY_SIGNAL else signal.Signals[fault].value
        )
        (self._notes / "fault").touch()
        os.kill(pid, number)
        if self._cell.phase is not Phase.IDLE:
            (self._notes / "go").touch()

    def _victims_pid(self) -> int:
        note = f"pid-{self._cell.victim.replace(' ', '-')}"
        self._wait_for_note(note, f"the {self._cell.victim} has not started")
        return int((self._notes / note).read_text())

    # From the fault to the end.

    def _hurt_and_watch(self, seen: Seen) -> None:
        if is_from_outside(self._cell):
            self._fault_from_outside()
        else:
            self._wait_for_note("fault", "the phase has not been reached")
        # The clock of files, on the clock of everything else.
        file_s = (self._notes / "fault").stat().st_mtime
        fault_s = file_s - time.time() + time.monotonic()
        outcome = outcome_of(self._cell)
        if outcome is Outcome.WAITS:
            time.sleep(_STOPPED_S)
            self._process.send_signal(signal.SIGCONT)
        if self._cell.phase is Phase.IDLE:
            self._go_on_after_idling(fault_s)
        self._wait_for(lambda: self._process.poll() is not None, "the program has not ended")
        seen.exit_code = self._process.returncode
        if outcome is Outcome.GOES_DOWN:
            if wait_until_gone(self._mark, self._deadline_s - time.monotonic()):
                raise CellFailedError("HANG: its children have not ended")
            seen.detection_s = time.monotonic() - fault_s
        self._errors.finish()
        self._find_line(seen, fault_s)

    def _go_on_after_idling(self, fault_s: float) -> None:
        """Let the program find work again: once what has happened is on the terminal, or it has had time."""
        pattern = cause_pattern(self._cell)
        limit_s = time.monotonic() + _NOTICED_WHILE_IDLE_S
        if self._cell.fault is not Fault.SIGSTOP and pattern is not None:
            while time.monotonic() < limit_s and not self._matching(pattern, fault_s):
                time.sleep(0.01)
        (self._notes / "go").touch()

    def _find_line(self, seen: Seen, fault_s: float) -> None:
        pattern = cause_pattern(self._cell)
        found = [] if pattern is None else self._matching(pattern, fault_s)
        # What is said of the fault in other words is noticed all the same.
        found = found or self._matching(r"^tprt: |WARNING|ERROR|Error: ", fault_s)
        if found:
            moment_s, seen.line = found[0]
            if outcome_of(self._cell) in (Outcome.FATAL, Outcome.REPLACED):
                seen.detection_s = moment_s - fault_s

    def _matching(self, pattern: str, since_s: float) -> list[tuple[float, str]]:
        # The clock of files moves in steps of some milliseconds.
        return [
            (at_s, line)
            for at_s, line in list(self._errors.found)
            if at_s > since_s - 0.01 and re.search(pattern, line)
        ]

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            if time.monotonic() > self._deadline_s:
                raise CellFailedError(f"HANG: {what} after {time.monotonic() - self._started_s:.0f} s")
            time.sleep(0.005)

    def _wait_for_note(self, name: str, what: str) -> None:
        note = self._notes / name
        self._wait_for(lambda: note.exists() or self._process.poll() is not None, what)
        if not note.exists():
            code, last = self._process.returncode, self._errors.text[-500:]
            raise CellFailedError(f"NO FAULT: {what}, and the program ended with exit code {code}: {last}")

    def _files_left(self) -> list[str]:
        """Return what is left in the temporary folder, and whether the next start would remove it."""
        left = sorted(path.name for path in self._temporary.iterdir())
        if not left:
            return []
        ran = subprocess.run(
            [sys.executable, "-c", "from launch.run_dir import RunDir; RunDir.create().remove()"],
            env={**os.environ, "TMPDIR": str(self._temporary), "PYTHONPATH": str(_ROOT)},
            timeout=DEADLINE_S,
            check=False,
        )
        is_removed = ran.returncode == 0 and not any(self._temporary.iterdir())
        return [
            f"{re.sub('tprt-.*', 'run directory', name)}{', until the next start' if is_removed else ''}"
            for name in left
        ]


def run_cell(cell: Cell, target: Target, deadline_s: float = DEADLINE_S) -> Seen:
    """Run `cell` on `target` in a folder of its own; one that takes longer than `deadline_s` hangs."""
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as folder:
        return CellRun(cell, target, Path(folder), deadline_s).run()
