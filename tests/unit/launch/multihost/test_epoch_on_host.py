"""The ranks of a host live and die with its connection to node rank 0, which hears what they die of."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launch.child_log import LogTee
from launch.child_process import ChildSpec
from launch.multihost import epoch_on_host
from launch.multihost.epoch_on_host import EpochOnHost
from launch.multihost.frames import FrameLane
from launch.multihost.news import BEAT, DONE, FAILED, START, pack
from launch.rank_specs import make_rank_specs
from tprt.config import Config
from tprt.coordinator.cause import CauseKind

WAIT_S = 20.0
OWN = {"interface": "lo", "token": "t"}
HOSTS = {
    "nnodes": 2,
    "node_rank": 1,
    "nproc_per_node": [1, 2],
    "rdzv_endpoint": "h:29400",
    "heartbeat_timeout_s": 1.0,
}
SLEEP = "import time; time.sleep(600)"


class NodeRank0:
    """The other end of the connection."""

    def __init__(self, lane: FrameLane, ending: Future[str], end_epoch: Callable[[], None]) -> None:
        self.lane = lane
        self.ending = ending
        self.end_epoch = end_epoch
        self.beats: list[list[int]] = []

    def wait_for(self, *expected: str) -> Any:
        """Return the content of the next message of one of these kinds, giving signs of life meanwhile."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            self.lane.send(pack(BEAT))
            message = self.lane.wait_for_message(0.1)
            if message is not None:
                ((kind, content),) = json.loads(message).items()
                self.beats = content if kind == BEAT else self.beats
                if kind in expected:
                    return content
        raise AssertionError(f"{expected} did not come")

    def wait_for_pids(self) -> list[int]:
        """Return the processes of ranks 1 and 2, as their heartbeats tell."""
        while [beat[0] for beat in self.beats if beat[7]] != [1, 2]:
            self.wait_for(BEAT)
        return [beat[7] for beat in self.beats]


Run = Callable[[str], NodeRank0]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Return what starts an epoch whose ranks are a program of Python."""

    def make_specs(config: Config, run_dir: Path, epoch: int, interface: str) -> list[ChildSpec]:
        env = {"PYTHONPATH": str(tmp_path)}
        specs = make_rank_specs(config, run_dir, epoch, interface)
        return [ChildSpec(spec.name, "fake_rank", {**spec.env, **env}, rank=spec.rank) for spec in specs]

    monkeypatch.setattr(epoch_on_host, "make_rank_specs", make_specs)
    settings = {"model": {"path": "m"}, "parallel": {"tensor_parallel_size": 3}, "hosts": HOSTS}
    ours, theirs = tcp_pair()
    lane, first = FrameLane(ours), FrameLane(theirs)
    epoch = EpochOnHost(Config.model_validate(settings), tmp_path, lane, LogTee(), OWN)
    with ThreadPoolExecutor(1) as pool:

        def start(program: str) -> NodeRank0:
            (tmp_path / "fake_rank.py").write_text(program)
            first.send(pack(START, {"epoch": 4, "env": {"MASTER_PORT": "7"}}))
            return NodeRank0(first, pool.submit(epoch.run), epoch.end)

        yield start
        first.close()
    epoch.end()
    epoch.end()
    lane.close()
    assert [path for path in tmp_path.iterdir() if "epoch" in path.name or "heartbeats" in path.name] == []


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


def are_gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_ranks_find_their_place_and_an_end_in_order_is_told(run: Run, tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE TPRT_EPOCH MASTER_PORT TPRT_STEPS_TOKEN"
    first = run(
        "import os\nfrom pathlib import Path\n"
        f"found = ' '.join(os.environ[name] for name in {names!r}.split())\n"
        f"Path({str(tmp_path)!r}, 'rank' + os.environ['RANK']).write_text(found)"
    )
    first.wait_for(DONE)
    assert first.ending.result(WAIT_S) == ""
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (1, 2)] == ["1 0 3 2 4 7 t", "2 1 3 2 4 7 t"]


def test_a_rank_that_dies_is_told_with_its_last_lines_and_takes_the_others_along(run: Run) -> None:
    first = run(f"import os, sys\nif os.environ['RANK'] == '2':\n    print('oh'); sys.exit(3)\n{SLEEP}")
    kind, text, is_input_error, is_from_outside = first.wait_for(FAILED)
    assert (kind, is_input_error, is_from_outside) == (CauseKind.SILENT_DEATH, False, False)
    assert text.startswith("last lines of the log of rank 2:\n  oh\nrank 2 (pid ")
    first.lane.close()
    assert "ended unexpectedly with exit code 3" in first.ending.result(WAIT_S)


def test_ranks_do_not_outlive_the_connection(run: Run) -> None:
    first = run(SLEEP)
    pids = first.wait_for_pids()
    assert not are_gone(pids)
    first.lane.close()
    assert "has ended this group of ranks: the connection was closed" in first.ending.result(WAIT_S)
    first.end_epoch()
    assert are_gone(pids)


def test_node_rank_0_that_is_silent_is_given_up(run: Run) -> None:
    first = run(SLEEP)
    first.wait_for_pids()
    begin_s = time.monotonic()
    assert "nothing has been heard of the host of node rank 0 for 1." in first.ending.result(WAIT_S)
    assert time.monotonic() - begin_s > 0.5
