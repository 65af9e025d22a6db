"""Health is told from progress: the last step and the last sign of the ranks against what waits."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from launch import cli, status_command
from launch.run_dir import (
    RunDir,
    heartbeats_path,
    living_run_dirs,
    newest_heartbeats,
    replica_dirs,
    write_config,
)
from launch.serving.record import ServerRecord, write_server
from launch.status import DeploymentStatus, ReplicaStatus, Signs, Verdict, judge, judge_replicas, look_at
from tprt.config import Config, ModelConfig, ParallelConfig
from tprt.transport.coordinator_beat import CoordinatorBeat, CoordinatorRecord
from tprt.transport.heartbeat import HeartbeatWriter, Phase, RankBeat
from tprt.transport.heartbeat_file import create_heartbeats

NOW_NS = 1_000_000_000_000
TIMEOUT_S = 30.0


def ago(seconds: float) -> int:
    return NOW_NS - int(seconds * 1e9)


def beat(rank: int, seconds: float, phase: Phase = Phase.IDLE) -> RankBeat:
    return RankBeat(rank, ago(seconds), phase=phase, pid=4700 + rank)


def signs(
    *beats: RankBeat,
    states: str | None = None,
    serves: bool = True,
    running: int = 0,
    waiting: int = 0,
    step_s: float = 1.0,
    oldest_s: float | None = None,
) -> Signs:
    oldest_ns = 0 if oldest_s is None else ago(oldest_s)
    record = CoordinatorRecord(ago(0.1), 0, 0, serves, 5, ago(step_s), running, waiting, oldest_ns, 4600)
    letters = [letter.replace(".", "") for letter in states or "S" * len(beats)]
    return Signs(NOW_NS, beats, letters, record, "S")


def without_record(found: Signs) -> Signs:
    return replace(found, record=None, coordinator_state="")


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (signs(beat(0, 900), beat(1, 900), step_s=900), Verdict.HEALTHY),
        (signs(beat(0, 0.1), beat(1, 0.2), running=3), Verdict.HEALTHY),
        (signs(beat(0, 0.1), running=3, waiting=2, oldest_s=50), Verdict.BUSY),
        # A long prefill finishes no step and shows layer after layer.
        (signs(beat(0, 0.1, Phase.PREFILL), running=1, step_s=90), Verdict.HEALTHY),
        (signs(beat(0, 31), beat(1, 40), running=1, step_s=35), Verdict.STALLED),
        (signs(beat(0, 31), running=1, waiting=1, step_s=35, oldest_s=2), Verdict.STALLED),
        # It came a moment ago, after a long time without work.
        (signs(beat(0, 900), waiting=1, step_s=900, oldest_s=2), Verdict.BUSY),
        (signs(beat(0, 900), waiting=1, step_s=900, oldest_s=31), Verdict.STALLED),
        (signs(beat(0, 1, Phase.LOAD), serves=False), Verdict.STARTING),
        (signs(beat(0, 1), serves=False), Verdict.STARTING),
        (Signs(NOW_NS), Verdict.STARTING),
        (without_record(signs(beat(0, 1), beat(1, 1, Phase.LOAD))), Verdict.STARTING),
        (without_record(signs(beat(0, 900), beat(1, 900))), Verdict.HEALTHY),
        (without_record(signs(beat(0, 31, Phase.DECODE), beat(1, 31))), Verdict.STALLED),
        (without_record(signs(beat(0, 1, Phase.DECODE))), Verdict.HEALTHY),
    ],
)
def test_the_verdict_follows_from_progress(found: Signs, verdict: Verdict) -> None:
    assert judge(found, TIMEOUT_S)[0] is verdict


@pytest.mark.parametrize(("state", "words"), [("T", "is stopped (state T)"), (".", "is gone")])
def test_a_process_that_can_make_no_progress_is_a_stall_even_when_there_is_nothing_to_do(
    state: str, words: str
) -> None:
    verdict, reason = judge(signs(beat(0, 1), beat(1, 1), states=f"S{state}"), TIMEOUT_S)
    assert (verdict, reason) == (Verdict.STALLED, f"rank 1 (pid 4701) {words}")


def test_a_stopped_coordinator_is_a_stall() -> None:
    verdict, reason = judge(replace(signs(beat(0, 1)), coordinator_state="T"), TIMEOUT_S)
    assert (verdict, reason) == (Verdict.STALLED, "coordinator (pid 4600) is stopped (state T)")


@pytest.fixture
def run_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run directory that this process owns, alone in its place."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        owned = RunDir.create()
        yield owned.path
        owned.remove()


def test_a_deployment_without_settings_and_heartbeats_is_starting(run_dir: Path) -> None:
    found = look_at(run_dir)
    assert found is not None
    assert (found.model, found.verdict) == ("unknown", Verdict.STARTING)


def test_a_deployment_is_read_from_its_files(run_dir: Path) -> None:
    write_config(run_dir, Config(model=ModelConfig(path="models/mine")))
    path = heartbeats_path(run_dir, 0)
    create_heartbeats(path, 2)
    beats = [HeartbeatWriter.open(path, rank) for rank in range(2)]
    coordinator = CoordinatorBeat.open(path, epoch=0)
    for writer in beats:
        writer.set_phase(Phase.IDLE)
    starting = look_at(run_dir)
    coordinator.begin_serving()
    coordinator.set_requests(1, 2, 3)
    busy = look_at(run_dir)
    assert starting is not None
    assert busy is not None
    assert (starting.model, starting.verdict, busy.verdict) == ("models/mine", Verdict.STARTING, Verdict.BUSY)
    for writer in (*beats, coordinator):
        writer.close()


def test_replicas_are_told_apart_and_the_lost_one_is_named(run_dir: Path) -> None:
    parallel = ParallelConfig(data_parallel_size=2)
    write_config(run_dir, Config(model=ModelConfig(path="models/mine"), parallel=parallel))
    writers: list[HeartbeatWriter | CoordinatorBeat] = []
    for folder in replica_dirs(run_dir, 2):
        folder.mkdir()
        path = heartbeats_path(folder, 0)
        create_heartbeats(path, 1)
        rank, coordinator = HeartbeatWriter.open(path, 0), CoordinatorBeat.open(path, epoch=0)
        rank.set_phase(Phase.IDLE)
        coordinator.begin_serving()
        writers += [rank, coordinator]
    healthy = look_at(run_dir)
    shutil.rmtree(replica_dirs(run_dir, 2)[1])
    degraded = look_at(run_dir)
    for writer in writers:
        writer.close()
    assert healthy is not None
    assert [one.verdict for one in healthy.replicas] == [Verdict.HEALTHY] * 2
    assert healthy.verdict is Verdict.HEALTHY
    assert degraded is not None
    assert (degraded.verdict, degraded.verdict.serves) == (Verdict.DEGRADED, True)
    assert degraded.reason.startswith("1 of 2 replicas serve; replica 1: lost")


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        ([Verdict.HEALTHY, Verdict.BUSY], Verdict.BUSY),
        ([Verdict.STARTING, Verdict.HEALTHY], Verdict.DEGRADED),
        ([Verdict.STARTING, Verdict.LOST], Verdict.STARTING),
        ([Verdict.STALLED, Verdict.LOST], Verdict.STALLED),
    ],
)
def test_a_deployment_does_as_its_replicas_do(verdicts: list[Verdict], whole: Verdict) -> None:
    assert judge_replicas([ReplicaStatus(signs(), one, "for some reason") for one in verdicts])[0] is whole


def test_replicas_are_shown_one_by_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = deployment(Verdict.HEALTHY)
    replicas = (
        ReplicaStatus(serving.signs, Verdict.HEALTHY, "nothing to do"),
        ReplicaStatus(signs(), Verdict.LOST, "its ranks have failed"),
    )
    whole = replace(serving, verdict=Verdict.DEGRADED, replicas=replicas)
    monkeypatch.setattr(status_command, "find_deployments", lambda: [whole])
    status_command.status(as_json=True)
    entry = json.loads(capsys.readouterr().out)
    assert [one["verdict"] for one in entry["replicas"]] == ["healthy", "lost"]
    assert [len(one["ranks"]) for one in entry["replicas"]] == [2, 0]
    assert "ranks" not in entry
    status_command.status(as_json=False)
    shown = capsys.readouterr().out
    assert "replica 0: healthy (nothing to do)" in shown
    assert "replica 1: lost (its ranks have failed)" in shown


def test_a_host_other_than_that_of_node_rank_0_tells_of_its_own_ranks(run_dir: Path) -> None:
    hosts = {"nnodes": 2, "node_rank": 1, "nproc_per_node": [1, 2], "rdzv_endpoint": "h:29400"}
    settings = {"model": {"path": "m"}, "parallel": {"tensor_parallel_size": 3}, "hosts": hosts}
    write_config(run_dir, Config.model_validate(settings))
    create_heartbeats(heartbeats_path(run_dir, 0), 3)
    writers = [HeartbeatWriter.open(heartbeats_path(run_dir, 0), rank) for rank in (1, 2)]
    for writer in writers:
        writer.set_phase(Phase.IDLE)
    found = look_at(run_dir)
    assert found is not None
    assert ([beat.rank for beat in found.signs.beats], found.verdict) == ([1, 2], Verdict.HEALTHY)
    for writer in writers:
        writer.close()


def test_a_server_must_be_there_and_ready_as_well(run_dir: Path) -> None:
    path = heartbeats_path(run_dir, 0)
    create_heartbeats(path, 1)
    rank, coordinator = HeartbeatWriter.open(path, 0), CoordinatorBeat.open(path, epoch=0)
    coordinator.begin_serving()

    def verdict_with(record: ServerRecord) -> tuple[Verdict, str]:
        write_server(run_dir, record)
        found = look_at(run_dir)
        assert found is not None
        assert found.signs.server == record
        return found.verdict, found.reason

    url, pid = "http://127.0.0.1:4711", os.getpid()
    assert verdict_with(ServerRecord(url=url, pid=pid, is_ready=False)) == (
        Verdict.STARTING,
        "the server is not ready",
    )
    assert verdict_with(ServerRecord(url=url, pid=pid, is_ready=True))[0] is Verdict.HEALTHY
    # Larger than any pid that the kernel gives.
    gone = verdict_with(ServerRecord(url=url, pid=2**22 + 1, is_ready=True))
    assert gone == (Verdict.STALLED, f"server (pid {2**22 + 1}) is gone")
    for writer in (rank, coordinator):
        writer.close()


def test_the_address_of_a_server_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = deployment(Verdict.HEALTHY)
    record = ServerRecord(url="http://127.0.0.1:4711", pid=7, is_ready=True)
    with_server = replace(without, signs=replace(without.signs, server=record, server_state="S"))
    monkeypatch.setattr(status_command, "find_deployments", lambda: [without, with_server])
    status_command.status(True)
    status_command.status(False)
    first, second, *table = capsys.readouterr().out.splitlines()
    assert json.loads(first)["server"] is None
    assert json.loads(second)["server"] == {"url": "http://127.0.0.1:4711", "pid": 7, "state": "S"}
    assert sum("http://127.0.0.1:4711" in line for line in table) == 1


def test_heartbeats_that_cannot_be_read_are_a_stall_with_the_reason(run_dir: Path) -> None:
    heartbeats_path(run_dir, 0).write_bytes(b"none of ours")
    found = look_at(run_dir)
    assert found is not None
    assert found.verdict is Verdict.STALLED
    assert "expected heartbeats of version" in found.reason


def test_the_newest_epoch_counts_and_drafts_do_not(run_dir: Path) -> None:
    assert newest_heartbeats(run_dir) is None
    for name in ("heartbeats-9", "heartbeats-10", "heartbeats-11.draft"):
        (run_dir / name).touch()
    assert newest_heartbeats(run_dir) == heartbeats_path(run_dir, 10)


def test_only_folders_whose_owner_lives_are_found_each_once(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = run_dir.parent / "tprt-left"
    left.mkdir()
    (left / "owner.lock").touch()
    (run_dir.parent / "tprt-notes").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_dir.parent))
    assert [path for path in living_run_dirs() if path.parent == run_dir.parent] == [run_dir]
    monkeypatch.setattr(os, "geteuid", lambda: run_dir.stat().st_uid + 1)
    assert living_run_dirs() == []


def deployment(verdict: Verdict) -> DeploymentStatus:
    found = signs(beat(0, 1, Phase.DECODE), RankBeat(1), states="S.", running=1, waiting=1, oldest_s=2)
    return DeploymentStatus(Path("/run/tprt-a"), "models/mine", found, verdict, "for some reason")


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([], 3),
        ([Verdict.HEALTHY, Verdict.BUSY], 0),
        ([Verdict.HEALTHY, Verdict.STARTING], 1),
        ([Verdict.STALLED], 1),
    ],
)
def test_the_exit_code_tells_whether_all_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdicts: list[Verdict], code: int
) -> None:
    monkeypatch.setattr(status_command, "find_deployments", lambda: [deployment(v) for v in verdicts])
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["tprt", "status", *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code or 0) == code
    lines = capsys.readouterr().out.splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    assert [entry["verdict"] for entry in entries] == verdicts
    assert sum(line.startswith("/run/tprt-a: models/mine: ") for line in lines) == len(verdicts)


def test_what_is_not_known_yet_is_null_in_json_and_a_dash_in_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status_command, "find_deployments", lambda: [deployment(Verdict.STALLED)])
    for as_json in (True, False):
        with pytest.raises(typer.Exit):
            status_command.status(as_json)
    entry, *table = capsys.readouterr().out.splitlines()
    unknown = json.loads(entry)["ranks"][1]
    assert unknown["phase"] == "spawn"
    assert {name for name, value in unknown.items() if value is None} == {
        *("pid", "step", "layer", "collective", "age_s")
    }
    assert table[-2].split() == ["1", "-", "-", "spawn", "-", "-", "-", "-", "-"]
