"""The ranks of an epoch end quietly, also when another process has removed the run directory before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from launch.child_log import LogTee
from launch.child_process import ChildSpec
from launch.rank_group import RankGroup


def make_group(tmp_path: Path, run_dir: Path) -> RankGroup:
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(600)")
    spec = ChildSpec("rank 0", "sleeper", {**os.environ, "PYTHONPATH": str(tmp_path)}, rank=0)
    return RankGroup(run_dir, 0, [spec], LogTee(), 1)


def has_ended(group: RankGroup) -> bool:
    return all(child.exit_code is not None for child in group.children)


def test_end_removes_what_the_ranks_have_left(tmp_path: Path) -> None:
    group = make_group(tmp_path, tmp_path)
    assert group.start() is None
    assert not has_ended(group)
    group.end()
    assert has_ended(group)
    assert not list(tmp_path.glob("*epoch-*")) + list(tmp_path.glob("heartbeats-*"))


def test_end_after_the_run_directory_is_gone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    group = make_group(tmp_path, run_dir)
    assert group.start() is None
    shutil.rmtree(run_dir)
    group.end()
    assert has_ended(group)
    assert not run_dir.exists()


def test_a_start_without_a_run_directory_is_told(tmp_path: Path) -> None:
    failure = make_group(tmp_path, tmp_path / "gone").start()
    assert failure is not None
    assert "could not be started" in failure
