"""The load bench: real ranks, every method cold and warm, failures that name the rank, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.bench import load_ranks
from launch.bench.load import bench_load
from launch.bench.load_peers import installed_peers
from launch.bench.load_ranks import LoadRanks, TeamLoad, running_ranks
from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.deployments import (
    TPRT,
    descendants,
    new_shared_memory,
    shared_memory,
    start,
    still_there,
)
from tprt.config import Config
from tprt.errors import CheckpointError, ConfigError, EngineDeadError

WAIT_S = 90.0
METHODS = ["tprt", *installed_peers()]
Row = dict[str, object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tiny(folder, TinyModel("qwen3", bias=True), shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Run the command on one and two ranks, and check that it leaves no process and no file behind."""
    work = tmp_path_factory.mktemp("bench")
    (work / "tmp").mkdir()
    (work / "deployment.yaml").write_text(f"model: {{path: {folder}}}\n")
    command = [TPRT, "bench", "load", str(work / "deployment.yaml"), "--json"]
    command += ["--ranks", "1,2", "--repeats", "2"]
    environment = {**os.environ, "TMPDIR": str(work / "tmp")}
    shared = shared_memory()
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert ran.returncode == 0, ran.stderr
    assert list((work / "tmp").iterdir()) == []
    assert new_shared_memory(shared) == []
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_every_method_has_a_row_cold_and_warm_for_each_number_of_ranks(rows: list[Row]) -> None:
    assert [(row["ranks"], row["cache"], row["method"]) for row in rows] == [
        (ranks, cache, method) for ranks in (1, 2) for cache in ("cold", "warm") for method in METHODS
    ]
    assert {row["rounds"] for row in rows} == {2}


def test_times_are_positive_and_beside_each_other(rows: list[Row]) -> None:
    for row in rows:
        assert 0 < row["wall_min_s"] <= row["wall_s"] <= row["wall_max_s"]
        assert (row["vs_get_tensor"] is None) == (row["method"] == "get_tensor")
        assert (row["vs_get_slice"] is None) == (row["method"] == "get_slice")
        if row["cache"] == "cold":
            assert row["sequential_s"] > 0
            assert row["vs_sequential"] > 0
        else:
            assert row["sequential_s"] is row["vs_sequential"] is None


def test_bytes_are_told_for_every_rank_and_none_has_read_less_than_it_keeps(rows: list[Row]) -> None:
    for row in rows:
        for name in ("read_bytes", "disk_bytes", "shard_bytes", "peak_bytes"):
            assert len(row[name]) == row["ranks"]
        # every byte is in some rank's shard
        assert sum(row["shard_bytes"]) >= row["file_bytes"]
        assert sum(row["read_bytes"]) >= row["file_bytes"]
        # which rank reads a shared part may differ between rounds
        assert 1.0 <= row["node_read_ratio"] <= sum(row["read_bytes"]) / row["file_bytes"] + 1e-3
        assert all(peak > shard for peak, shard in zip(row["peak_bytes"], row["shard_bytes"], strict=True))


def test_whole_tensors_are_read_by_every_rank_and_slices_are_what_it_keeps(rows: list[Row]) -> None:
    for row in rows:
        if row["method"] == "get_tensor":
            assert row["read_bytes"] == [row["file_bytes"]] * row["ranks"]
        if row["method"] == "get_slice":
            assert row["read_bytes"] == row["shard_bytes"]
        assert (row["own_read_ratio"] is None) == (row["method"] != "tprt")


def test_what_the_kernel_fetched_is_counted(rows: list[Row]) -> None:
    for row in rows:
        if row["cached"] == 0.0 and None not in row["disk_bytes"]:
            assert row["cache"] == "cold"
            assert sum(row["disk_bytes"]) >= row["file_bytes"]
        if row["cached"] == 1.0 and None not in row["disk_bytes"]:
            assert sum(row["disk_bytes"]) < row["file_bytes"]


def test_the_table_for_people_fits_a_terminal_with_every_method_whole(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "deployment.yaml").write_text(f"model: {{path: {folder}}}\n")
    command = [TPRT, "bench", "load", str(tmp_path / "deployment.yaml"), "--ranks", "1", "--repeats", "1"]
    environment = {**os.environ, "COLUMNS": "80"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert ran.returncode == 0, ran.stderr
    assert "…" not in ran.stdout
    for method in METHODS:
        assert f" {method} " in ran.stdout


@pytest.fixture
def ranks(folder: Path, tmp_path: Path) -> LoadRanks:
    return LoadRanks(str(folder), tmp_path, timeout_s=30.0)


def test_a_rank_that_cannot_load_is_named_with_its_error(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    ranks = LoadRanks(str(copy), tmp_path, timeout_s=30.0)
    failure = r"rank 0 of the load bench did not load by get_tensor: CheckpointError: .* not there"
    with pytest.raises(EngineDeadError, match=failure), running_ranks(ranks, 1):
        ranks.load("get_tensor", sums=False, prepare=next(copy.glob("*.safetensors")).unlink)
    assert still_there(ranks.pids) == []


def test_a_rank_whose_loading_is_killed_is_named_with_the_signal(ranks: LoadRanks) -> None:
    def kill_one() -> None:
        [loading] = descendants(ranks.pids[1])
        os.kill(loading, signal.SIGKILL)

    failure = "rank 1 of the load bench did not load by get_slice: ended with -9"
    with pytest.raises(EngineDeadError, match=failure), running_ranks(ranks, 2):
        ranks.load("get_slice", sums=False, prepare=kill_one)


def test_a_rank_that_dies_is_named_and_what_it_forked_dies_with_it(ranks: LoadRanks) -> None:
    def kill_rank() -> None:
        loading = descendants(ranks.pids[1])
        assert len(loading) == 1
        os.kill(ranks.pids[1], signal.SIGKILL)
        assert still_there(loading) == []

    with (
        pytest.raises(EngineDeadError, match="rank 1 of the load bench ended with -9"),
        running_ranks(ranks, 2),
    ):
        ranks.load("get_slice", sums=False, prepare=kill_rank)


def test_a_rank_that_is_late_is_named_and_ended(folder: Path, tmp_path: Path) -> None:
    ranks = LoadRanks(str(folder), tmp_path, timeout_s=0.5)
    loading: list[int] = []

    def stop_one() -> None:
        loading.extend(descendants(ranks.pids[1]))
        os.kill(loading[0], signal.SIGSTOP)

    failure = "rank 1 of the load bench has not managed to load by get_slice in time"
    with pytest.raises(EngineDeadError, match=failure), running_ranks(ranks, 2):
        ranks.load("get_slice", sums=False, prepare=stop_one)
    assert len(loading) == 1
    assert still_there([*ranks.pids, *loading]) == []


def test_ranks_that_fail_at_the_start_are_named(ranks: LoadRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_ranks.sys, "executable", "/bin/false")
    with pytest.raises(EngineDeadError, match="rank 0 of the load bench ended with 1"), running_ranks(ranks, 1):
        pass


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_the_bench_and_every_process_of_it(
    folder: Path, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "deployment.yaml").write_text(f"model: {{path: {folder}}}\n")
    command = [TPRT, "bench", "load", str(tmp_path / "deployment.yaml"), "--ranks", "1", "--repeats", "100000"]
    with start(command, {"TMPDIR": str(tmp_path / "tmp")}) as ran:
        deadline_s = time.monotonic() + WAIT_S
        # the bench's rank, and what it forks
        while len(started := descendants(ran.pid)) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        os.kill(ran.pid, number)
        _, errors = ran.communicate(timeout=WAIT_S)
    assert (ran.returncode, errors) == (exit_code, "")
    assert len(started) >= 2
    assert still_there(started) == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(("counts", "repeats"), [([0], 1), ([1], 0)])
def test_a_bench_of_nothing_is_refused(folder: Path, counts: list[int], repeats: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 or more of each"):
        bench_load(Config.model_validate({"model": {"path": str(folder)}}), counts, repeats)


def test_methods_that_fill_parameters_differently_are_found_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = LoadRanks.load

    def load_with_one_wrong(ranks: LoadRanks, method: str, sums: bool, prepare: Callable[[], None]) -> TeamLoad:
        done = load(ranks, method, sums, prepare)
        assert all(bool(one.checksum) == sums for one in done.ranks)
        if method == "tprt" and sums:
            done.ranks[1] = replace(done.ranks[1], checksum=done.ranks[1].checksum ^ 1)
        return done

    monkeypatch.setattr(LoadRanks, "load", load_with_one_wrong)
    with pytest.raises(CheckpointError, match="rank 1 of 2: tprt has filled the parameters with other bytes"):
        bench_load(Config.model_validate({"model": {"path": str(folder)}}), [2], 1)
