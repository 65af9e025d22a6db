"""`tprt bench broadcast` on real processes: a row for every transport, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TRANSPORTS = ["ring", "pickle_shm", "zmq_pub_sub", "gloo"]
WAIT_S = 60.0


class Command:
    """The command as a shell starts it: in a group of its own, and with a TMPDIR too long for sockets."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        temporary = folder / ("long" * 20)
        temporary.mkdir()
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("tprt")), "bench", "broadcast", *arguments],
            env={**os.environ, "TMPDIR": str(temporary), "XDG_RUNTIME_DIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> tuple[int, str, str]:
        """Return the exit code and what it wrote."""
        out, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out, err

    def children(self) -> list[str]:
        pid = self.process.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def interrupt(self) -> None:
        """Do what Ctrl-C does: a signal to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    @property
    def is_group_empty(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False


@pytest.fixture
def folder() -> Iterator[Path]:
    """One whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="tprt-test-") as name:
        yield Path(name)


def left_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.name.startswith("long")]


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        is_empty = command.is_group_empty
        if not is_empty:
            os.killpg(command.process.pid, signal.SIGKILL)
        command.process.communicate()
        assert is_empty, "the command left processes behind"


def run(commands: list[Command], folder: Path, *arguments: str) -> tuple[int, str, str]:
    commands.append(Command(list(arguments), folder))
    return commands[-1].finish()


def test_every_transport_is_measured_and_the_ring_loses_nothing(commands: list[Command], folder: Path) -> None:
    code, out, err = run(
        commands, folder, "--readers", "1,2", "--bytes", "256,65536", "--seconds", "0.05", "--json"
    )
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["readers"], row["num_bytes"], row["transport"]) for row in rows] == [
        (readers, size, name) for readers in (1, 2) for size in (256, 65536) for name in TRANSPORTS
    ]
    for row in rows:
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert row["messages_per_s"] > 0
        assert row["p50_to_ring"] > 0
        assert 0 <= row["lost"] < row["sent"]
        if row["transport"] in ("ring", "gloo"):
            assert row["lost"] == 0
    assert left_in(folder) == []


def test_idle_readers_are_measured_as_a_table(commands: list[Command], folder: Path) -> None:
    code, out, err = run(commands, folder, "--readers", "1", "--idle", "--seconds", "0.05")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if line.split()[:1] == ["1"]]
    assert [row[1] for row in rows] == TRANSPORTS
    for _, _, mean, most, p50, p99, ratio in rows:
        assert 0 < float(mean) <= float(most) < 100
        assert 0 < float(p50) <= float(p99)
        assert float(ratio) > 0


def test_ctrl_c_ends_every_process_at_once_and_in_silence(commands: list[Command], folder: Path) -> None:
    command = Command(["--readers", "2", "--bytes", "256", "--seconds", "600"], folder)
    commands.append(command)
    deadline_s = time.monotonic() + WAIT_S
    while len(command.children()) < len(TRANSPORTS) * 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    command.interrupt()
    code, out, err = command.finish()
    assert code != 0
    assert out == ""
    assert "Traceback" not in err
    assert left_in(folder) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--readers", "65"], "1 to 64 readers"),
        (["--bytes", "31"], "32 bytes or more"),
        (["--bytes", "4k"], "--bytes 4k: expected whole numbers"),
    ],
)
def test_a_bench_that_makes_no_sense_is_refused(
    commands: list[Command], folder: Path, arguments: list[str], said: str
) -> None:
    code, out, err = run(commands, folder, *arguments)
    assert (code, out) == (2, "")
    assert said in err
