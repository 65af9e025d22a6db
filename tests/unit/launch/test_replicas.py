"""Every replica gets devices, threads and a folder of its own, or a clear word of what is lacking."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launch.child_process import ChildSpec
from launch.coordinator_pulse import CoordinatorPulse
from launch.cuda_count import count_cuda_devices
from launch.cuda_devices import CudaDevice
from launch.parent_death import DEPLOYMENT_DIR, RUN_DIR, remove_run_dir
from launch.replica_pulses import ReplicaPulses
from launch.replicas import VISIBLE_DEVICES, share_out, visible_devices
from launch.run_dir import RunDir, replica_dirs
from tprt.config import Config
from tprt.errors import ConfigError, EngineDeadError

RANK = ChildSpec("rank 1", "launch.worker_entry", {}, rank=1)
COORDINATOR = ChildSpec("coordinator", "launch.coordinator_entry", {})


def config(**sections: dict[str, Any]) -> Config:
    sections["parallel"] = {"tensor_parallel_size": 2, "data_parallel_size": 2} | sections.get("parallel", {})
    return Config.model_validate({"model": {"path": "m"}} | sections)


def gpus(count: int) -> Callable[[], int]:
    return lambda: count


def no_look() -> list[CudaDevice]:
    raise AssertionError("no device need be looked at")


def test_each_replica_sees_the_devices_of_its_ranks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VISIBLE_DEVICES, raising=False)
    replicas = share_out(config(), tmp_path, gpus(5), no_look)
    assert [one.equip(RANK).env[VISIBLE_DEVICES] for one in replicas] == ["0,1", "2,3"]
    assert VISIBLE_DEVICES not in replicas[0].equip(COORDINATOR).env


def test_devices_keep_the_names_that_they_were_given() -> None:
    given = {VISIBLE_DEVICES: "7,GPU-aa,3,1,0"}
    assert visible_devices(config(), gpus(4), given) == ["7", "GPU-aa", "3", "1"]


@pytest.mark.parametrize(("device", "count"), [("auto", 3), ("cuda", 0)])
def test_too_few_devices_are_named_with_what_to_change(tmp_path: Path, device: str, count: int) -> None:
    said = f"data_parallel_size 2 x tensor_parallel_size 2 needs 4 CUDA devices, and {count} are visible; lower"
    with pytest.raises(ConfigError, match=said):
        share_out(config(runtime={"device": device}), tmp_path, gpus(count), no_look)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_cpus_are_shared_out_among_all_ranks(tmp_path: Path, device: str) -> None:
    replicas = share_out(config(runtime={"device": device}), tmp_path, gpus(0), no_look)
    expected = max(1, len(os.sched_getaffinity(0)) // 4)
    assert [one.config.runtime.num_threads for one in replicas] == [expected] * 2
    assert VISIBLE_DEVICES not in replicas[1].equip(RANK).env
    (given, _) = share_out(config(runtime={"device": device, "num_threads": 7}), tmp_path, gpus(0), no_look)
    assert given.config.runtime.num_threads == 7


def test_rank_weights_follow_the_devices_of_each_replica(tmp_path: Path) -> None:
    devices = [CudaDevice("GPU", size * 2**30, 0) for size in (80, 80, 80, 48)]
    automatic = config(parallel={"rank_weights": "auto"})
    replicas = share_out(automatic, tmp_path, gpus(4), lambda: devices)
    assert [one.config.parallel.rank_weights for one in replicas] == [None, (80.0, 48.0)]


def test_processes_of_replicas_are_told_apart_in_folders_environment_and_log_files(tmp_path: Path) -> None:
    logging = {"dir": str(tmp_path), "local_ranks_filter": [3]}
    first, second = share_out(config(runtime={"device": "cpu"}, logging=logging), tmp_path, gpus(0), no_look)
    specs = [first.equip(RANK), second.equip(RANK)]
    assert [spec.sink.path for spec in specs] == [
        tmp_path / "replica-0-rank-1.log",
        tmp_path / "replica-1-rank-1.log",
    ]
    # of the four ranks on this host it is the last
    assert [spec.sink.is_shown for spec in specs] == [False, True]
    assert [spec.env[RUN_DIR] for spec in specs] == [str(folder) for folder in replica_dirs(tmp_path, 2)]
    assert {spec.env[DEPLOYMENT_DIR] for spec in specs} == {str(tmp_path)}


def test_the_only_replica_has_the_folder_of_the_deployment_and_asks_no_driver(tmp_path: Path) -> None:
    (only,) = share_out(config(parallel={"data_parallel_size": 1}), tmp_path, no_look, no_look)  # type: ignore[arg-type]
    assert (only.run_dir, only.name) == (tmp_path, "")
    assert only.equip(RANK).env == {RUN_DIR: str(tmp_path)}


def test_ranks_that_torchrun_has_started_are_those_of_one_replica(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    named = RunDir.create(name="meeting")
    with pytest.raises(ConfigError, match="torchrun has started the ranks of one replica"):
        share_out(config(runtime={"device": "cpu"}), named.path, gpus(0), no_look)
    named.remove()


def test_the_driver_is_asked_by_another_process() -> None:
    found = count_cuda_devices()
    assert (found > 0) == Path("/dev/nvidiactl").exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"hosts": {"nnodes": 2, "rdzv_endpoint": "10.0.0.1:29400"}},
            "data_parallel_size is 2 and hosts.nnodes 2",
        ),
        ({"parallel": {"allow_shared_gpu": True}}, "allow_shared_gpu with data_parallel_size 2"),
        ({"parallel": {"data_parallel_size": 0}}, "data_parallel_size"),
    ],
)
def test_what_replicas_cannot_have_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**sections)


def test_the_last_coordinator_that_ends_removes_the_folder_of_the_deployment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "tprt-x"
    folders = replica_dirs(whole, 2)
    monkeypatch.setenv(DEPLOYMENT_DIR, str(whole))
    for folder in folders:
        folder.mkdir(parents=True)
    for folder, left in zip(folders, (True, False), strict=True):
        monkeypatch.setenv(RUN_DIR, str(folder))
        remove_run_dir()
        assert (folder.exists(), whole.exists()) == (False, left)


class _StuckPulse(CoordinatorPulse):
    """A coordinator that does not answer."""

    def __init__(self) -> None:
        self.is_stuck = False

    def raise_if_stopped(self) -> None:
        raise EngineDeadError("coordinator is stuck")


def test_a_stuck_coordinator_ends_its_replica_and_the_last_one_the_deployment() -> None:
    given_up: list[tuple[int, str]] = []
    pulses = ReplicaPulses({0: _StuckPulse(), 1: _StuckPulse()}, lambda *what: given_up.append(what))
    with pytest.raises(EngineDeadError, match="stuck"):
        pulses.raise_if_stopped()
    assert given_up == [(0, "coordinator is stuck")]
    assert pulses.is_stuck
