"""Of several deaths the first cause is named, with where it happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.failure import Death, describe, first_cause, read_failure, write_failure
from tprt.errors import CheckpointError, EngineDeadError, PeerLostError, TprtError


def failed(run_dir: Path, name: str, error: ValueError | TprtError) -> Death:
    try:
        raise error
    except (ValueError, TprtError) as raised:
        write_failure(run_dir, name, "decode", raised)
    return Death(name, 7, 1, read_failure(run_dir, name))


def test_an_error_of_its_own_comes_before_a_silent_death_and_that_before_a_consequence(tmp_path: Path) -> None:
    consequence = failed(tmp_path, "rank 0", PeerLostError("rank 2 is gone"))
    coordinator = failed(tmp_path, "coordinator", EngineDeadError("rank 2 is gone"))
    silent = Death("rank 1", 8, -9, None)
    own = failed(tmp_path, "rank 2", ValueError("boom"))
    assert first_cause([consequence, coordinator, silent, own]) is own
    assert first_cause([consequence, coordinator, silent]) is silent
    assert first_cause([coordinator, consequence]) is consequence


def test_the_earlier_of_two_errors_is_the_cause(tmp_path: Path) -> None:
    first = failed(tmp_path, "rank 3", ValueError("first"))
    second = failed(tmp_path, "rank 1", ValueError("second"))
    assert first_cause([second, first]) is first


def test_the_last_line_has_the_gist_and_the_traceback_is_above_it(tmp_path: Path) -> None:
    lines = describe(failed(tmp_path, "rank 2", ValueError("boom"))).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("rank 2 (host ")
    assert lines[-1].endswith("failed in phase decode: ValueError: boom")


def test_an_error_that_is_written_for_the_user_needs_no_traceback(tmp_path: Path) -> None:
    assert describe(failed(tmp_path, "rank 0", CheckpointError("x.safetensors is truncated"))) == (
        "rank 0: x.safetensors is truncated"
    )


@pytest.mark.parametrize(
    ("code", "words"), [(-11, "was killed by SIGSEGV"), (3, "unexpectedly with exit code 3")]
)
def test_a_silent_death_is_told_by_its_exit_code(code: int, words: str) -> None:
    assert words in describe(Death("rank 1", 8, code, None))
