"""The processes of a benchmark have a place to meet wherever those of a deployment have one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.bench.bench_dir import bench_dir


def test_sockets_fit_also_where_the_path_for_temporary_files_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with bench_dir() as folder:
        assert os.path.isdir(folder)
        # What a transport makes there has some 20 bytes more, and a unix socket 107 in all.
        assert len(folder) < 87
    assert not os.path.exists(folder)
