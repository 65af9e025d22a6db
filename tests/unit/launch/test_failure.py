"""Of several deaths the first cause is named, with where it happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launch.failure import (
    Death,
    ReportedCauseError,
    cause_of,
    describe,
    forget_failures,
    read_failure,
    write_failure,
)
from tprt.coordinator.cause import Cause, CauseKind, first_cause
from tprt.errors import CheckpointError, EngineDeadError, PeerLostError, TprtError, TransportTimeoutError


def failed(run_dir: Path, name: str, error: ValueError | TprtError) -> Death:
    try:
        raise error
    except (ValueError, TprtError) as raised:
        write_failure(run_dir, name, "decode", raised)
    return Death(name, 7, 1, read_failure(run_dir, name), step=12)


def first(*deaths: Death) -> str:
    return first_cause([cause_of(death) for death in deaths]).text


def test_an_error_of_its_own_comes_before_a_silent_death_and_that_before_a_consequence(tmp_path: Path) -> None:
    consequence = failed(tmp_path, "rank 0", PeerLostError("rank 2 is gone"))
    coordinator = failed(tmp_path, "coordinator", EngineDeadError("it was rank 2"))
    silent = Death("rank 1", 8, -9, None)
    own = failed(tmp_path, "rank 2", ValueError("boom"))
    assert first(consequence, coordinator, silent, own) == describe(own)
    assert first(consequence, coordinator, silent) == describe(silent)
    assert first(consequence, coordinator) == describe(coordinator)


def test_the_earlier_of_two_errors_is_the_cause(tmp_path: Path) -> None:
    earlier = failed(tmp_path, "rank 3", ValueError("first"))
    later = failed(tmp_path, "rank 1", ValueError("second"))
    assert first(later, earlier) == describe(earlier)


def test_the_last_line_has_the_gist_and_the_traceback_is_above_it(tmp_path: Path) -> None:
    lines = describe(failed(tmp_path, "rank 2", ValueError("boom"))).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("rank 2 (host ")
    assert ", step 12, pid " in lines[-1]
    assert lines[-1].endswith("failed in phase decode: ValueError: boom")


def test_an_error_that_is_written_for_the_user_needs_no_traceback(tmp_path: Path) -> None:
    assert describe(failed(tmp_path, "rank 0", CheckpointError("x.safetensors is truncated"))) == (
        "rank 0: x.safetensors is truncated"
    )


def test_the_coordinators_last_word_is_the_cause_that_it_has_found(tmp_path: Path) -> None:
    text = "Traceback\nrank 1 failed: it was this"
    assert describe(failed(tmp_path, "coordinator", EngineDeadError(text))) == text


def test_what_only_the_user_can_put_right_is_told_from_what_may_go_better_next_time(tmp_path: Path) -> None:
    assert cause_of(failed(tmp_path, "rank 0", CheckpointError("gone"))).is_input_error
    assert not cause_of(failed(tmp_path, "rank 0", TransportTimeoutError("late"))).is_input_error
    assert not cause_of(failed(tmp_path, "rank 0", ValueError("odd"))).is_input_error


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-11, "was killed by SIGSEGV in phase load"),
        (-36, "was killed by signal 36"),
        (3, "unexpectedly with exit code 3 in phase load"),
    ],
)
def test_a_silent_death_is_told_by_its_exit_code_and_phase(code: int, words: str) -> None:
    assert words in describe(Death("rank 1", 8, code, None, phase="load"))


def test_the_step_of_a_silent_death_is_told_where_it_was_in_one() -> None:
    assert describe(Death("rank 1", 8, -9, None, phase="decode", step=4)).endswith("in phase decode, step 4")
    assert describe(Death("rank 1", 8, -9, None, phase="idle", step=4)).endswith("in phase idle")


def test_a_signal_that_comes_from_outside_is_told_from_a_crash() -> None:
    assert cause_of(Death("rank 1", 8, -signal.SIGKILL, None)).is_from_outside
    assert not cause_of(Death("rank 1", 8, -signal.SIGSEGV, None)).is_from_outside
    assert not cause_of(Death("rank 1", 8, 3, None)).is_from_outside


def test_a_kill_for_want_of_memory_is_told_from_one_by_a_person() -> None:
    killed = Death("rank 1", 8, -signal.SIGKILL, None, is_out_of_memory=True)
    assert not cause_of(killed).is_from_outside
    assert describe(killed).endswith("was killed by SIGKILL; the kernel was short of memory at that time")
    ended = Death("rank 1", 8, -signal.SIGTERM, None, is_out_of_memory=True)
    assert cause_of(ended).is_from_outside
    assert "memory" not in describe(ended)


def test_last_log_lines_and_stack_are_above_the_gist() -> None:
    death = Death("rank 1", 8, -6, None, log=("one", "two"), stack="Fatal Python error: Aborted\n")
    assert describe(death).splitlines() == [
        "last lines of the log of rank 1:",
        "  one",
        "  two",
        "Fatal Python error: Aborted",
        "rank 1 (pid 8) was killed by SIGABRT",
    ]


def test_what_an_earlier_process_of_that_name_left_is_forgotten(tmp_path: Path) -> None:
    failed(tmp_path, "rank 1", ValueError("boom"))
    forget_failures(tmp_path, ["rank 0", "rank 1"])
    assert read_failure(tmp_path, "rank 1") is None


def test_a_cause_that_is_only_passed_on_stays_what_it_is(tmp_path: Path) -> None:
    cause = Cause(CauseKind.SILENT_DEATH, "log\nrank 2 was killed by SIGKILL", is_from_outside=True)
    write_failure(tmp_path, "other hosts", "decode", ReportedCauseError(cause))
    record = read_failure(tmp_path, "other hosts")
    assert record is not None
    found = cause_of(Death("other hosts", 8, None, record))
    assert (found.kind, found.text, found.is_from_outside) == (cause.kind, cause.text, True)
    lost = cause_of(failed(tmp_path, "rank 0", PeerLostError("rank 2 is gone")))
    assert first_cause([lost, found]) == found
