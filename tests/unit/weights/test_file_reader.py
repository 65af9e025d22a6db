"""Any range of a file comes out right, cached or not, and a file that shrinks is noticed."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkpoint_layouts import evict
from tprt.errors import CheckpointError
from tprt.weights.file_reader import FileReader, buffer_bytes

CONTENT = os.urandom(3 * 2**20 + 123)
RANGES = [
    (0, 10),
    (1, 4096),
    (4095, 4097),
    (12_345, 2_000_000),
    (len(CONTENT) - 50, len(CONTENT)),
    (0, len(CONTENT)),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    return file


@pytest.fixture
def reader(file: Path) -> Iterator[FileReader]:
    """A reader that reads past the page cache."""
    reader = FileReader(file, past_cache=True)
    yield reader
    reader.close()


@pytest.fixture
def cached_reader(file: Path) -> Iterator[FileReader]:
    """A reader that reads through the page cache."""
    reader = FileReader(file, past_cache=False)
    yield reader
    reader.close()


def read(reader: FileReader, start: int, stop: int) -> bytes:
    memory = mmap.mmap(-1, buffer_bytes(stop - start))
    result = reader.read(memoryview(memory), start, stop)
    assert result.read_bytes >= stop - start >= 0
    return memory[result.start : result.start + stop - start]


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_a_range_is_what_the_file_has_cached_or_not(
    file: Path, reader: FileReader, cached_reader: FileReader, start: int, stop: int
) -> None:
    for each in (reader, cached_reader):
        evict(file)
        assert read(each, start, stop) == CONTENT[start:stop]
        assert read(each, start, stop) == CONTENT[start:stop]


def test_what_is_not_cached_is_read_without_filling_the_cache(file: Path, reader: FileReader) -> None:
    evict(file)
    if reader.is_cached(0, len(CONTENT)):
        pytest.skip("this file system keeps files in memory")
    read(reader, 0, 2**20)
    assert not reader.is_cached(0, 2**20)


def test_what_others_of_this_host_need_as_well_stays_in_the_cache(
    file: Path, cached_reader: FileReader
) -> None:
    evict(file)
    read(cached_reader, 0, 2**20)
    assert cached_reader.is_cached(0, 2**20)


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_a_range_can_be_mapped_and_copied(reader: FileReader, start: int, stop: int) -> None:
    with reader.mapped(start, stop) as view:
        assert bytes(view) == CONTENT[start:stop]
    copy = bytearray(stop - start)
    reader.copy(memoryview(copy), start)
    assert copy == CONTENT[start:stop]


def test_a_file_system_that_refuses_to_read_past_the_cache_is_read_through_it(
    file: Path, reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, calls = os.preadv, 0

    def refuse_once(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(fd, buffers, offset)

    evict(file)
    monkeypatch.setattr(os, "preadv", refuse_once)
    monkeypatch.setattr(FileReader, "is_cached", lambda self, start, stop: False)
    assert read(reader, 7, 70_000) == CONTENT[7:70_000]
    assert read(reader, 9, 90_000) == CONTENT[9:90_000]
    assert calls == 3


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_file_that_has_become_shorter_is_named(
    file: Path, reader: FileReader, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    monkeypatch.setattr(FileReader, "is_cached", lambda self, start, stop: is_cached)
    os.truncate(file, 8192)
    with pytest.raises(CheckpointError, match=r"file ended at byte 8192 while it was read"):
        read(reader, 4000, 20_000)


def test_an_error_of_the_disk_is_told_with_the_file(
    reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"file cannot be read: Input/output error"):
        read(reader, 0, 100)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone cannot be opened: No such file"):
        FileReader(tmp_path / "gone", past_cache=False)
