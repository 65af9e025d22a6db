"""Each process has a log file of its own, and the terminal shows the ranks that were asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.child_log import SHOWN, ChildLog, LogSink, LogTee
from launch.log_dir import make_log_dir, sink_of
from tprt.config import LoggingConfig
from tprt.errors import ConfigError

Write = Callable[[LogSink, bytes], bytes]


@pytest.fixture
def write() -> Write:
    def write_through(sink: LogSink, data: bytes) -> bytes:
        """Return what standard error gets when a child with this sink writes `data`."""
        (source, child), (reader, stderr) = os.pipe(), os.pipe()
        log = ChildLog(source, LogTee(stderr), sink)
        os.write(child, data)
        os.close(child)
        log.read()
        assert log.last_lines() == [data.decode().rstrip()]
        os.close(stderr)
        try:
            return os.read(reader, 65536)
        finally:
            os.close(reader)

    return write_through


def test_all_is_shown_and_nothing_written_by_default(write: Write) -> None:
    assert sink_of("rank 1", LoggingConfig(), 1) == SHOWN
    assert write(SHOWN, b"line\n") == b"line\n"


def test_the_file_has_what_earlier_processes_of_that_name_wrote_as_well(write: Write, tmp_path: Path) -> None:
    logging = LoggingConfig(dir=str(tmp_path / "logs"))
    make_log_dir(logging)
    for epoch in (b"first\n", b"second\n"):
        assert write(sink_of("rank 1", logging, 1), epoch) == epoch
    assert (tmp_path / "logs" / "rank-1.log").read_bytes() == b"first\nsecond\n"


def test_a_rank_that_is_filtered_out_is_in_its_file_alone(write: Write, tmp_path: Path) -> None:
    logging = LoggingConfig(dir=str(tmp_path), local_ranks_filter=(0,))
    assert write(sink_of("rank 5", logging, 1), b"quiet\n") == b""
    assert (tmp_path / "rank-5.log").read_bytes() == b"quiet\n"
    assert write(sink_of("rank 4", logging, 0), b"shown\n") == b"shown\n"
    assert write(sink_of("coordinator", logging), b"always\n") == b"always\n"


def test_a_folder_that_cannot_be_made_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"logging\.dir .*/file/logs cannot be used: Not a directory"):
        make_log_dir(LoggingConfig(dir=str(tmp_path / "file" / "logs")))
