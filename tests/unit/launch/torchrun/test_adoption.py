"""A rank that torchrun has started finds its environment in the run directory of its host's first process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.child_log import LogTee
from launch.child_process import ChildSpec
from launch.failure import cause_of, write_failure
from launch.rank_group import RankGroup
from launch.rank_specs import make_rank_specs
from launch.run_dir import RunDir, find_named, heartbeats_path
from launch.torchrun import adoption
from launch.torchrun.adoption import adopt, wait_to_be_adopted
from tprt.config import Config
from tprt.coordinator.cause import CauseKind
from tprt.errors import ConfigError, EngineDeadError, TransportTimeoutError
from tprt.transport.heartbeat import announce_process

WAIT_S = 20.0
SPEC = ChildSpec("rank 1", "launch.worker_entry", {"RANK": "1"}, rank=1, is_adopted=True)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The writable place that is tried first; short, as paths of sockets must be."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def run_dir(folder: Path) -> Iterator[RunDir]:
    run_dir = RunDir.create(name="meeting")
    assert run_dir.path.parent == folder
    yield run_dir
    run_dir.remove()


def test_a_rank_waits_for_its_environment(run_dir: RunDir) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_to_be_adopted, "meeting", "rank 1", WAIT_S)
        adopt(run_dir.path, SPEC)
        assert waiting.result(WAIT_S) == {"RANK": "1"}


def test_a_rank_whose_first_process_has_ended_does_not_wait(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "owner_lives", lambda path: path != run_dir.path)
    with pytest.raises(EngineDeadError, match="has ended before this rank could begin"):
        wait_to_be_adopted("meeting", "rank 1", WAIT_S)


def test_a_run_directory_that_nobody_makes_is_waited_for_until_the_deadline(folder: Path) -> None:
    with pytest.raises(TransportTimeoutError, match="same TMPDIR, MASTER_ADDR and MASTER_PORT"):
        wait_to_be_adopted("meeting", "rank 1", 0.0)
    assert list(folder.iterdir()) == []


def test_a_second_deployment_does_not_take_the_place_of_a_living_one(run_dir: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"is there already: .* another MASTER_PORT"):
        RunDir.create(name="meeting")
    assert find_named("meeting") == run_dir.path


def test_all_ranks_of_a_host_but_its_first_process_are_adopted(run_dir: RunDir, folder: Path) -> None:
    config = Config.model_validate({"model": {"path": "m"}, "parallel": {"tensor_parallel_size": 3}})
    specs = make_rank_specs(config, run_dir.path, 0, "lo")
    assert [spec.is_adopted for spec in specs] == [False, True, True]
    assert not any(spec.is_adopted for spec in make_rank_specs(config, folder, 0, "lo"))


def test_the_end_of_an_adopted_rank_is_told_with_its_phase_or_in_its_own_words(run_dir: RunDir) -> None:
    group = RankGroup(run_dir.path, 0, [SPEC], LogTee(), 2)
    assert group.start() is None
    assert group.children == []
    heartbeats = heartbeats_path(run_dir.path, 0)
    assert group.deaths() == []
    with subprocess.Popen(["true"]) as ended:
        announce_process(heartbeats, 1, ended.pid, 0)
    (gone,) = [cause_of(death) for death in group.deaths()]
    assert gone.kind == CauseKind.SILENT_DEATH
    assert gone.text == f"rank 1 (pid {ended.pid}) has ended without a report in phase spawn"
    write_failure(run_dir.path, "rank 1", "decode", ValueError("odd"))
    (told,) = [cause_of(death) for death in group.deaths()]
    assert told.kind == CauseKind.OWN_ERROR
    assert told.gist.endswith("failed in phase decode: ValueError: odd")
    group.end()


END_IN_ORDER = """
import sys
from tprt.transport.heartbeat import HeartbeatWriter, Phase
HeartbeatWriter.open(sys.argv[1], 1).set_phase(Phase.SHUTDOWN)
"""


def test_an_adopted_rank_that_has_ended_in_order_is_not_lost(run_dir: RunDir) -> None:
    group = RankGroup(run_dir.path, 0, [SPEC], LogTee(), 2)
    assert group.start() is None
    heartbeats = heartbeats_path(run_dir.path, 0)
    subprocess.run([sys.executable, "-c", END_IN_ORDER, heartbeats], check=True, timeout=WAIT_S)
    assert not group.has_lost_adopted()
    write_failure(run_dir.path, "rank 1", "shutdown", ValueError("odd"))
    assert group.has_lost_adopted()
    group.end()
