"""A part of the chaos matrix: one cell of each kind of fault, of phase and of process comes out as it must.

How soon a fault is noticed is measured by scripts/chaos.py and asserted nowhere, as a loaded machine is late.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.chaos import PROMPTS, make_deployment
from scripts.chaos_cell import run_cell
from scripts.chaos_matrix import Cell, Fault, Victim
from scripts.chaos_target import Target, run_undisturbed
from scripts.chaos_traces import living
from scripts.chaos_verdict import judge
from tprt.transport.heartbeat import Phase

MAX_TOKENS = 12
CELLS = [
    Cell(Victim.RANK_0, Phase.SPAWN, Fault.EXIT),
    Cell(Victim.RANK_1, Phase.LOAD, Fault.MEMORY_ERROR),
    Cell(Victim.RANK_0, Phase.PREFILL, Fault.EXCEPTION),
    Cell(Victim.RANK_1, Phase.DECODE, Fault.SKIP),
    Cell(Victim.RANK_0, Phase.IDLE, Fault.SIGSTOP),
    Cell(Victim.COORDINATOR, Phase.DECODE, Fault.SIGSEGV),
    Cell(Victim.SUPERVISOR, Phase.DECODE, Fault.SIGKILL),
    Cell(Victim.RANK_1, Phase.SHUTDOWN, Fault.SIGTERM),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(make_deployment(tmp_path_factory.mktemp("chaos")), PROMPTS, MAX_TOKENS)


@pytest.fixture(scope="module")
def expected(target: Target) -> list[list[int]]:
    """The tokens of an undisturbed run."""
    return run_undisturbed(target)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_fault_ends_as_it_must(target: Target, expected: list[list[int]], cell: Cell) -> None:
    seen = run_cell(cell, target)
    problems = [problem for problem in judge(cell, seen, expected).problems if "noticed" not in problem]
    assert problems == [], seen.log
    assert [len(tokens) for tokens in expected] == [MAX_TOKENS] * len(PROMPTS)


class SleepingTarget(Target):
    """In the place of a deployment, a program that never comes to any phase."""

    def command(self) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The marks of the cells that are run."""
    found: list[str] = []
    kill_all: Callable[[str], None] = sys.modules["scripts.chaos_cell"].kill_all  # type: ignore[attr-defined]

    def note_and_kill(mark: str) -> None:
        found.append(mark)
        kill_all(mark)

    monkeypatch.setattr("scripts.chaos_cell.kill_all", note_and_kill)
    return found


def test_a_cell_that_hangs_is_told_and_ended(marks: list[str]) -> None:
    cell = Cell(Victim.RANK_1, Phase.DECODE, Fault.SIGKILL)
    seen = run_cell(cell, SleepingTarget("", PROMPTS, MAX_TOKENS), deadline_s=1.0)
    assert seen.failure.startswith("HANG: the phase has not been reached")
    (mark,) = marks
    assert living(mark) == {}
    assert not (Path("/tmp") / mark).exists()
