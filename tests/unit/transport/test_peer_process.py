"""What can be seen of a process from outside, and what is asked only of those that can answer."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tprt.transport import peer_process
from tprt.transport.peer_process import (
    DUMP_SIGNAL,
    is_gone,
    is_stopped,
    process_state,
    request_stack,
    state_words,
)


@pytest.fixture
def gone() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen(["true"]) as child:
        child.wait()
    return child.pid


@pytest.fixture
def stacks(tmp_path: Path) -> Iterator[Path]:
    """The file where this process writes its stacks when asked."""
    path = tmp_path / "stack.txt"
    with path.open("ab", buffering=0) as file:
        faulthandler.register(DUMP_SIGNAL, file, all_threads=True, chain=False)
        yield path
        faulthandler.unregister(DUMP_SIGNAL)


def test_the_state_of_a_process_is_its_letter_or_nothing(gone: int) -> None:
    assert process_state(os.getpid()) == "R"
    assert process_state(gone) == ""


def test_a_process_with_brackets_in_its_name_has_its_own_state() -> None:
    program = "open('/proc/self/comm', 'w').write('a) Z (b'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert "a) Z (b" in Path(f"/proc/{child.pid}/stat").read_text()
        assert process_state(child.pid) in ("R", "S")
        child.communicate(b"\n")


@pytest.mark.parametrize(
    ("state", "words", "gone", "stopped"),
    [
        ("R", "computes (state R)", False, False),
        ("D", "waits in the kernel for a disk or a device (state D)", False, False),
        ("T", "is stopped (state T)", False, True),
        ("t", "is held by a debugger (state t)", False, True),
        ("Z", "has ended (state Z)", True, False),
        ("I", "is there (state I)", False, False),
        ("", "is gone", True, False),
    ],
)
def test_a_state_is_put_into_words(state: str, words: str, gone: bool, stopped: bool) -> None:
    assert (state_words(state), is_gone(state), is_stopped(state)) == (words, gone, stopped)


def test_a_process_that_is_asked_for_its_stack_gives_it_each_time_anew(stacks: Path) -> None:
    for _ in range(2):
        stack = request_stack(os.getpid(), stacks)
        assert stack.count("in test_a_process_that_is_asked_for_its_stack_gives_it_each_time_anew") == 1


def test_a_process_that_does_not_catch_the_signal_is_not_asked(stacks: Path) -> None:
    faulthandler.unregister(DUMP_SIGNAL)
    assert request_stack(os.getpid(), stacks) == ""


def test_a_process_that_is_gone_or_has_no_file_gives_no_stack(stacks: Path, gone: int) -> None:
    assert request_stack(gone, stacks) == ""
    assert request_stack(os.getpid(), stacks.parent / "none") == ""


def test_a_process_that_does_not_answer_is_not_waited_for_long(
    stacks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_process, "_DUMP_S", 0.02)
    other = stacks.parent / "other"
    other.touch()
    assert request_stack(os.getpid(), other) == "", "the answer goes elsewhere"
