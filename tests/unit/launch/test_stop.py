"""`tprt stop` ends the deployments that are meant, and no others; here they are a process with a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer

from launch import stop_command
from launch.run_dir import RunDir, living_run_dirs, open_owner
from launch.stop_command import stop
from tprt.errors import ConfigError, TprtError

# Ends with 128 + 15 at the signal of the given number.
_OWNER = """
import signal, sys, time
from launch.run_dir import RunDir, write_config
from tprt.config import Config
owned, left = RunDir.create(), int(sys.argv[1])
def note(number, frame):
    global left
    left -= 1
    if not left:
        owned.remove()
        sys.exit(128 + number)
signal.signal(signal.SIGTERM, note)
short = {"server": {"drain_timeout_s": 0.2}, "supervision": {"shutdown_grace_s": 0.2}}
write_config(owned.path, Config.model_validate({"model": {"path": "some-model"}, **short}))
print(owned.path, flush=True)
while True:
    time.sleep(60)
"""

Start = Callable[[int], tuple[Path, "subprocess.Popen[str]"]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Start]:
    """Start an owner of a run directory that ends at its nth signal; nothing else is found to be running."""
    folder = Path("/tmp") / f"stop-{os.getpid()}"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    own = lambda: [path for path in living_run_dirs() if path.parent == folder]  # noqa: E731
    monkeypatch.setattr(stop_command, "living_run_dirs", own)
    with ExitStack() as stack:
        stack.callback(folder.rmdir)

        def start_owner(num_signals: int) -> tuple[Path, subprocess.Popen[str]]:
            process = subprocess.Popen(
                [sys.executable, "-c", _OWNER, str(num_signals)], stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
            assert process.stdout is not None
            return Path(process.stdout.readline().strip()), process

        yield start_owner


def test_the_only_one_is_stopped_without_being_named(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, process = start(1)
    stop()
    assert process.poll() == 128 + 15
    assert capsys.readouterr().out == f"{run_dir}: some-model: stopped\n"


def test_of_several_only_those_that_are_named_are_stopped(start: Start) -> None:
    (first, one), (second, other) = start(1), start(1)
    with pytest.raises(ConfigError, match="name those to stop, or give --all:") as said:
        stop()
    assert all(f"{path}  some-model" in str(said.value) for path in (first, second))
    with pytest.raises(ConfigError, match=r"tprt-other: no such deployment; running are:"):
        stop([first.name, "tprt-other"])
    assert (one.poll(), other.poll()) == (None, None)
    stop([first.name])
    assert (one.wait(10), other.poll()) == (143, None)
    stop([str(second)])
    assert other.wait(10) == 143


def test_now_signals_twice_and_so_does_the_end_of_patience(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, one), (_, other) = start(2), start(2)
    stop(stop_all=True, now=True)
    assert (one.wait(10), other.wait(10)) == (143, 143)
    monkeypatch.setattr(stop_command, "_MARGIN_S", 0.1)
    _, late = start(3)
    with pytest.raises(TprtError, match=rf"has not ended .* kill -KILL {late.pid} takes"):
        stop()
    assert late.poll() is None


def test_it_says_when_there_is_none(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        stop()
    assert ended.value.exit_code == 3
    assert capsys.readouterr().out == "no deployment of this user is running on this host\n"


def test_a_process_that_has_got_the_pid_of_an_owner_is_not_taken_for_it(start: Start) -> None:
    owned = RunDir.create()
    found = open_owner(owned.path)
    assert found is not None
    assert found[0] == os.getpid()
    os.close(found[1])
    (owned.path / "owner.lock").write_text(str(os.getppid()))
    assert open_owner(owned.path) is None
    with pytest.raises(TprtError, match="cannot be seen from here"):
        stop([owned.path.name])
    owned.remove()
