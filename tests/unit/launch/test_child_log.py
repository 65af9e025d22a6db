"""What children write is passed on, its end is kept, and nobody who does not read holds anything up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from launch.child_log import ChildLog, LogTee


@dataclass
class Pipes:
    """A child's pipe, a reader of standard error, and what is between them."""

    child: int
    reader: int
    tee: LogTee
    log: ChildLog

    def read(self) -> bytes:
        data = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.reader, 65536):
                data += part
        return data


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    (source, child), (reader, stderr) = os.pipe(), os.pipe()
    os.set_blocking(reader, False)
    tee = LogTee(stderr)
    log = ChildLog(source, tee)
    yield Pipes(child, reader, tee, log)
    log.close()
    for fd in (child, reader, stderr):
        with contextlib.suppress(OSError):
            os.close(fd)


def test_bytes_are_passed_on_as_they_are_and_lines_are_kept(pipes: Pipes) -> None:
    os.write(pipes.child, b"one\nt\xc3")
    pipes.log.read()
    os.write(pipes.child, b"\xa4g\nthree")
    pipes.log.read()
    assert pipes.read() == b"one\nt\xc3\xa4g\nthree"
    assert pipes.log.last_lines() == ["one", "täg", "three"]


def test_the_last_twenty_lines_are_kept(pipes: Pipes) -> None:
    os.write(pipes.child, b"".join(b"line %d\n" % n for n in range(100)))
    pipes.log.read()
    assert pipes.log.last_lines() == [f"line {n}" for n in range(80, 100)]


def test_of_a_progress_bar_the_last_state_is_kept(pipes: Pipes) -> None:
    os.write(pipes.child, b"10%\r50%\r100%\n")
    pipes.log.read()
    assert pipes.log.last_lines() == ["100%"]


def test_what_was_written_before_the_end_is_there_after_it(pipes: Pipes) -> None:
    os.write(pipes.child, b"last words")
    os.close(pipes.child)
    pipes.log.read()
    assert pipes.log.last_lines() == ["last words"]
    assert pipes.log.fileno() == -1


def test_a_reader_that_does_not_read_holds_nobody_up_and_is_told_what_it_has_missed(pipes: Pipes) -> None:
    for _ in range(40):
        os.write(pipes.child, b"x" * 65000 + b"\n")
        pipes.log.read()
    assert pipes.tee.has_backlog
    seen = b""
    while pipes.tee.has_backlog:
        seen += pipes.read()
        pipes.tee.flush()
    os.write(pipes.child, b"again\n")
    pipes.log.read()
    seen += pipes.read()
    left_out = 40 * 65001 - seen.count(b"x") - seen.count(b"x\n")
    assert left_out > 0
    assert f"[{left_out} bytes of log left out: standard error was not read]\nagain\n".encode() in seen


def test_a_reader_that_is_gone_is_no_error(pipes: Pipes) -> None:
    os.close(pipes.reader)
    os.write(pipes.child, b"to nobody\n")
    pipes.log.read()
    assert not pipes.tee.has_backlog
    assert pipes.log.last_lines() == ["to nobody"]
