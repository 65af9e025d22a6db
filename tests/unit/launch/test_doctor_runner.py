"""A check that waits for another begins as soon as that one stands in nobody's way, and not before."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator

import pytest

from launch.doctor import runner
from launch.doctor.checks import CHECKS, Check
from launch.doctor.finding import Finding, ok
from launch.doctor.request import DoctorRequest
from launch.doctor.runner import Runner
from tests.support.doctoring import request_for

# By which one check of this file hears that another has run.
HEAR, TELL = os.pipe()
Said = list[tuple[str, str]]


def frees_early(request: DoctorRequest) -> Iterator[Finding]:
    """Free the others, and end only after one of them has run."""
    yield ok("free", "", visible=3)
    assert os.read(HEAR, 1) == b"x"
    yield ok("rest", "")


def tells(request: DoctorRequest) -> Iterator[Finding]:
    yield ok(f"told {request.gpus.get('visible')}", "")
    os.write(TELL, b"x")


def dies(request: DoctorRequest) -> Iterator[Finding]:
    yield from ()
    os._exit(3)


def run_behind(first: str, monkeypatch: pytest.MonkeyPatch) -> Said:
    """Run a check that may free the other early, and one that waits for it.

    Returns:
        what is said, in its order: the name of a check with `began`, `ended` or the name of a line.
    """
    checks = (
        Check("first", f"{__name__}:{first}", frees="free"),
        Check("second", f"{__name__}:tells", needs_torch=True, after="free"),
    )
    monkeypatch.setattr(runner, "CHECKS", checks)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        Runner(request_for(runtime={"device": "cuda"}), theirs.fileno()).run()
        theirs.close()
        said = [json.loads(message) for message in iter(lambda: ours.recv(65536), b"")]
    return [(checks[number].name, what if isinstance(what, str) else what["check"]) for number, what in said]


def test_a_check_that_is_freed_early_is_told_why_and_begins_before_the_other_one_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = run_behind("frees_early", monkeypatch)
    order = [("first", "free"), ("second", "told 3"), ("first", "rest"), ("first", "ended")]
    assert sorted(order, key=said.index) == order
    assert said[-1][1] == "ended"


def test_a_check_waits_for_the_end_of_one_that_frees_nobody_also_when_it_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = run_behind("dies", monkeypatch)
    assert said[:3] == [("first", "began"), ("first", "first"), ("first", "ended")]
    assert said[3:] == [("second", "began"), ("second", "told None"), ("second", "ended")]
    assert os.read(HEAR, 1) == b"x"


def test_what_is_awaited_is_there() -> None:
    names = {name for check in CHECKS for name in (check.name, check.frees)}
    assert {check.after for check in CHECKS if check.after} <= names
