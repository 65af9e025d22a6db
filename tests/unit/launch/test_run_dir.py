"""Run directories: private, where there is room, and collected when their owner was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.run_dir import RunDir, request_address, worker_socket, write_config
from tprt.config import Config, ModelConfig
from tprt.errors import ConfigError

PROGRAM = (
    "from launch.run_dir import RunDir\nimport sys\nprint(RunDir.create().path, flush=True)\nsys.stdin.read()"
)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The writable place that is tried first; short, as paths of sockets must be."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def start_owner() -> tuple[subprocess.Popen[str], Path]:
    """Start a process that makes a run directory and keeps it."""
    owner = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    return owner, Path(owner.stdout.readline().strip())


def test_a_run_directory_is_private_and_goes_with_all_that_is_in_it(folder: Path) -> None:
    run_dir = RunDir.create()
    assert run_dir.path.parent == folder
    assert run_dir.path.stat().st_mode & 0o777 == 0o700
    (run_dir.path / "workers-0.sock").touch()
    before = len(os.listdir("/proc/self/fd"))
    run_dir.remove()
    run_dir.remove()
    assert list(folder.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_what_a_killed_process_has_left_is_removed_at_the_next_start(folder: Path) -> None:
    owner, left = start_owner()
    with owner:
        living = RunDir.create()
        assert left.is_dir(), "its owner lives"
        owner.send_signal(signal.SIGKILL)
    assert left.is_dir()
    assert living.path.is_dir()
    new = RunDir.create()
    assert set(folder.iterdir()) == {living.path, new.path}
    for run_dir in (living, new):
        run_dir.remove()


def test_folders_of_other_kinds_and_of_other_users_are_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_lock = folder / "tprt-notes"
    without_lock.mkdir()
    owner, left = start_owner()
    with owner:
        owner.send_signal(signal.SIGKILL)
    link = folder / "tprt-link"
    link.symlink_to(left)
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    RunDir.create().remove()
    assert set(folder.iterdir()) == {without_lock, left, link}
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", str(folder))
    RunDir.create().remove()
    assert set(folder.iterdir()) == {without_lock, link}


@pytest.mark.parametrize("unfit", ["nowhere", "x" * 70])
def test_a_place_that_does_not_fit_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, unfit: str
) -> None:
    (folder / ("x" * 70)).mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / unfit))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    run_dir = RunDir.create()
    assert run_dir.path.parent == folder
    run_dir.remove()


def test_the_paths_of_sockets_fit_where_the_folder_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = folder / ("y" * (63 - len(str(folder))))
    longest.mkdir()
    monkeypatch.setenv("TMPDIR", str(longest))
    run_dir = RunDir.create()
    assert run_dir.path.parent == longest
    for path in (worker_socket(run_dir.path, 10**9), request_address(run_dir.path)):
        assert len(path.removeprefix("ipc://")) < 107
    run_dir.remove()


def test_no_place_at_all_is_an_error_that_says_what_was_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(prefix: str, dir: str) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ConfigError, match=r"/tmp: Read-only file system.*/dev/shm: Read-only.*set TMPDIR"):
        RunDir.create()


def test_a_folder_without_room_for_the_configuration_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"run directory {folder}/gone cannot be written: No such file"):
        write_config(folder / "gone", Config(model=ModelConfig(path="model")))
