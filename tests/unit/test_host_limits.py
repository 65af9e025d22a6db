"""Limits of control groups are read in both versions, and the tightest of all that hold counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from tprt.host_limits import cpu_quota, memory_left

V1_CPU = Path("/sys/fs/cgroup/cpu")


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_tightest_quota_of_version_2_counts(tmp_path: Path) -> None:
    files = {"own": "0::/a/b\n", "fs/cpu.max": "max 100000\n", "fs/a/cpu.max": "150000 100000\n"}
    root = write(tmp_path, files | {"fs/a/b/cpu.max": "400000 100000\n"})
    assert cpu_quota(root / "own", root / "fs") == 1.5


def test_the_quota_of_version_1_is_read_in_its_own_tree(tmp_path: Path) -> None:
    files = {"own": "4:cpu,cpuacct:/docker/x\n0::/\n", "fs/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"}
    files |= {"fs/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "50000\n"}
    files |= {"fs/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n"}
    root = write(tmp_path, files)
    assert cpu_quota(root / "own", root / "fs") == 0.5


def test_no_limit_is_none(tmp_path: Path) -> None:
    root = write(tmp_path, {"own": "0::/\n", "fs/cpu.max": "max 100000\n", "fs/memory.max": "max\n"})
    assert cpu_quota(root / "own", root / "fs") is None
    assert memory_left(root / "own", root / "fs") is None


@pytest.mark.parametrize(
    "files",
    [
        {
            "own": "0::/a\n",
            "fs/a/memory.max": "1000\n",
            "fs/a/memory.current": "700\n",
            "fs/a/memory.stat": "anon 500\ninactive_file 200\n",
        },
        {
            "own": "4:memory:/a\n",
            "fs/memory/a/memory.limit_in_bytes": "1000\n",
            "fs/memory/a/memory.usage_in_bytes": "700\n",
            "fs/memory/a/memory.stat": "inactive_file 0\ntotal_inactive_file 200\n",
            "fs/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "fs/memory/memory.usage_in_bytes": "5000\n",
        },
    ],
    ids=["version_2", "version_1"],
)
def test_memory_that_is_left_counts_idle_pages_of_files(tmp_path: Path, files: Mapping[str, str]) -> None:
    root = write(tmp_path, files)
    assert memory_left(root / "own", root / "fs") == 500


@pytest.mark.skipif(
    not os.access(V1_CPU, os.W_OK), reason="this user may not make a control group of version 1"
)
def test_a_real_quota_is_found() -> None:
    group = V1_CPU / f"tprt-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("50000")
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                (group / "cgroup.procs").write_text(str(os.getpid()))
                os.write(writer, str(cpu_quota()).encode())
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.close(writer)
        found = os.read(reader, 100)
        os.close(reader)
        os.waitpid(pid, 0)
        assert found == b"0.5"
    finally:
        group.rmdir()
