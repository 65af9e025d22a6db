"""The chaos matrix has every cell, and nothing that is other than it must be passes for good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from scripts.chaos_cell import Seen
from scripts.chaos_matrix import (
    PHASES,
    Cell,
    Fault,
    Outcome,
    Victim,
    all_cells,
    cause_pattern,
    exit_code_of,
    outcome_of,
    why_not_applicable,
)
from scripts.chaos_report import markdown
from scripts.chaos_verdict import head, judge, row
from tprt.transport.heartbeat import Phase

TOKENS = [[1, 2, 3], [4, 5]]
KILLED = Cell(Victim.RANK_1, Phase.DECODE, Fault.SIGKILL)
LINE = "rank 1 (pid 7) was killed by SIGKILL in phase decode, step 3; starting the ranks again, restart 1 of 3"
GOOD = Seen(detection_s=0.2, line=LINE, exit_code=0, tokens=TOKENS, log=LINE)


def test_every_fault_meets_every_process_in_every_phase() -> None:
    cells = list(all_cells())
    assert len(cells) == len(set(cells)) == len(Fault) * len(Victim) * 9
    assert len(PHASES) == 9


def test_cells_that_make_no_sense_have_a_reason_and_are_few() -> None:
    left_out = {cell: why for cell in all_cells() if (why := why_not_applicable(cell))}
    assert {cell.fault for cell in left_out} == {Fault.SKIP, Fault.EXCEPTION, Fault.MEMORY_ERROR}
    assert len(left_out) == 2 * 9 + 2 * 6 + 2 * 2


def test_only_what_nobody_can_or_need_say_has_no_words() -> None:
    silent = {outcome_of(cell) for cell in all_cells() if cause_pattern(cell) is None}
    assert silent == {Outcome.HARMLESS, Outcome.WAITS, Outcome.GOES_DOWN}


def test_what_ends_all_has_an_exit_code_that_says_so() -> None:
    for cell in all_cells():
        is_fatal = outcome_of(cell) in (Outcome.FATAL, Outcome.GOES_DOWN)
        assert (exit_code_of(cell) != 0) == is_fatal, cell


def test_a_cell_as_it_must_be_is_good() -> None:
    found = row(KILLED, GOOD, TOKENS)
    assert (found["verdict"], found["problems"]) == ("good", [])
    assert (found["names_cause"], found["names_phase"], found["tokens_equal"]) == (True, True, True)


WRONG: list[tuple[str, Callable[[Seen], Seen]]] = [
    ("HANG: the program has not ended", lambda s: replace(s, failure="HANG: the program has not ended")),
    ("exit code 1, expected 0", lambda s: replace(s, exit_code=1)),
    ("the cause is not named", lambda s: replace(s, log="rank 0 was killed by SIGKILL in phase decode")),
    ("the phase is not named", lambda s: replace(s, line="rank 1 (pid 7) was killed by SIGKILL")),
    ("tokens differ from the undisturbed run's", lambda s: replace(s, tokens=[[1, 2, 3], [4, 5, 5]])),
    ("tokens differ from the undisturbed run's", lambda s: replace(s, tokens=[[1, 2, 3]])),
    ("noticed after 1.3 s, 1 s at most", lambda s: replace(s, detection_s=1.3)),
    ("1 processes survive", lambda s: replace(s, survivors=["-m launch.worker_entry"])),
    ("left behind: run directory", lambda s: replace(s, leftovers=["run directory"])),
]


@pytest.mark.parametrize(("problem", "change"), WRONG, ids=[problem for problem, _ in WRONG])
def test_whatever_is_wrong_makes_a_cell_bad(problem: str, change: Callable[[Seen], Seen]) -> None:
    assert judge(KILLED, change(GOOD), TOKENS).problems == [problem]


def test_what_ends_all_must_be_told_in_the_last_line() -> None:
    cell = Cell(Victim.RANK_1, Phase.LOAD, Fault.EXIT)
    line = "rank 1 (pid 7) ended unexpectedly with exit code 7 in phase load"
    seen = Seen(0.2, line, 1, log=f"something\n{line}\n")
    assert judge(cell, seen, TOKENS).problems == []
    assert judge(cell, replace(seen, log=f"{line}\nsomething\n"), TOKENS).problems == ["the cause is not named"]


def test_the_tables_have_a_place_for_every_cell_and_list_what_is_wrong() -> None:
    rows = []
    for cell in all_cells():
        if why := why_not_applicable(cell):
            rows.append({**head(cell), "verdict": "n/a", "reason": why})
        else:
            rows.append(row(cell, replace(GOOD, exit_code=exit_code_of(cell)), TOKENS))
    text = markdown(rows)
    lines = [line for line in text.splitlines() if line.startswith("| ") and "phase" not in line.split("|")[1]]
    assert len(lines) == len(Victim) * len(PHASES)
    assert all("|  |" not in line for line in lines)
    assert "| decode | replaced, 0.20 s, exit 0 |" in text
    problems = [line for line in text.splitlines() if line.startswith("* the cause is not named: ")]
    assert len(problems) == 1
    assert "`rank 1/load/SIGSEGV`" in problems[0]
    assert "`rank 1/decode/SIGKILL`" not in problems[0]
