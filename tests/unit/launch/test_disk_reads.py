"""The page cache is emptied, filled and asked, and what a process has read and held is counted."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from launch.bench import disk_reads
from launch.bench.disk_reads import (
    cached_share,
    disk_bytes_read,
    empty_cache,
    fill_cache,
    peak_memory_bytes,
    read_in_one_stream,
    reset_peak_memory,
    settle_memory,
)
from tprt.errors import CheckpointError

# One more than blocks of the disk, so that the last is cut.
SIZES = (9 * 2**20 + 1, 3 * 2**20, 0)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{number}.bin" for number in range(len(SIZES))]
    for file, size in zip(files, SIZES, strict=True):
        file.write_bytes(b"x" * size)
    return files


@pytest.fixture
def on_a_disk(files: list[Path]) -> None:
    empty_cache(files)
    if cached_share(files) != 0.0:
        pytest.skip("this file system keeps files in memory, or the kernel does not tell")


@pytest.mark.usefixtures("on_a_disk")
def test_the_cache_is_empty_after_emptying_and_full_after_filling(files: list[Path]) -> None:
    fill_cache(files)
    assert cached_share(files) == 1.0
    empty_cache(files)
    assert cached_share(files) == 0.0


@pytest.mark.usefixtures("on_a_disk")
def test_reading_past_the_cache_leaves_it_empty_and_fetches_every_byte(files: list[Path]) -> None:
    before = disk_bytes_read()
    took_s = read_in_one_stream(files, direct=True)
    if took_s is None:
        pytest.skip("this file system cannot read past the cache")
    after = disk_bytes_read()
    assert took_s > 0
    assert cached_share(files) == 0.0
    if before is not None and after is not None:
        assert sum(SIZES) <= after - before <= sum(SIZES) + 2**20


def test_reading_through_the_cache_fills_it(files: list[Path]) -> None:
    empty_cache(files)
    assert read_in_one_stream(files, direct=False)
    assert cached_share(files) in (1.0, None)


def test_where_reads_past_the_cache_are_refused_there_is_no_time(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(disk_reads.os, "open", refuse)
    assert read_in_one_stream(files, direct=True) is None
    with pytest.raises(OSError, match="Invalid argument"):
        read_in_one_stream(files, direct=False)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.bin cannot be opened: No such file"):
        cached_share([tmp_path / "gone.bin"])


def test_the_peak_of_memory_begins_anew_when_reset() -> None:
    held = bytearray(64 * 2**20)
    with_it = peak_memory_bytes()
    del held
    reset_peak_memory()
    without = peak_memory_bytes()
    assert 0 < without < with_it - 32 * 2**20


def test_settling_memory_touches_all_of_it_and_keeps_none() -> None:
    reset_peak_memory()
    before = peak_memory_bytes()
    settle_memory(64 * 2**20)
    # the kernel counts a little behind
    assert peak_memory_bytes() > before + 60 * 2**20
    reset_peak_memory()
    assert peak_memory_bytes() < before + 32 * 2**20
