"""Every rank gets a device and an all-reduce that work, or a message that says what to change."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cuda_driver import are_gpus_linked
from launch.devices import (
    RankDevice,
    cache_folder,
    choose_all_reduce,
    choose_device,
    is_mps_running,
    place_on_gpu,
    prepare_shared_memory,
)
from tprt.config import ParallelConfig
from tprt.errors import ConfigError


def cuda(index: int, num_sharers: int, any_shared: bool) -> RankDevice:
    return RankDevice(torch.device("cuda", index), num_sharers, any_shared)


def test_ranks_have_gpus_of_their_own_where_there_are_enough() -> None:
    for allowed in (False, True):
        placed = [place_on_gpu(rank, 2, 3, allowed) for rank in range(2)]
        assert placed == [cuda(0, 1, False), cuda(1, 1, False)]


def test_ranks_share_gpus_in_turn_if_that_is_allowed() -> None:
    assert [place_on_gpu(rank, 3, 1, True) for rank in range(3)] == [cuda(0, 3, True)] * 3
    placed = [place_on_gpu(rank, 3, 2, True) for rank in range(3)]
    assert placed == [cuda(0, 2, True), cuda(1, 1, True), cuda(0, 2, True)]


def test_more_ranks_than_gpus_are_refused_with_what_to_change() -> None:
    words = r"3 ranks of this host need a CUDA device each, but 2 are visible; .*allow_shared_gpu: true"
    with pytest.raises(ConfigError, match=words):
        place_on_gpu(0, 3, 2, False)
    with pytest.raises(ConfigError, match=r"but 0 are visible; lower parallel.tensor_parallel_size, or set"):
        place_on_gpu(0, 1, 0, True)


def test_a_cpu_rank_has_all_of_its_device() -> None:
    assert choose_device("cpu", 1, 2, allow_shared_gpu=True) == RankDevice(torch.device("cpu"), 2)


@pytest.mark.parametrize(
    ("setting", "device", "any_shared", "chosen"),
    [
        ("auto", "cpu", False, "shm"),
        ("auto", "cuda", False, "nccl"),
        ("auto", "cuda", True, "symm_mem"),
        *(("gloo", device, shared, "gloo") for device in ("cpu", "cuda") for shared in (False, True)),
        ("shm", "cpu", False, "shm"),
        ("nccl", "cuda", False, "nccl"),
        *(("symm_mem", "cuda", shared, "symm_mem") for shared in (False, True)),
    ],
)
def test_an_all_reduce_that_works_there_is_taken(
    setting: str, device: str, any_shared: bool, chosen: str
) -> None:
    assert choose_all_reduce(setting, device, any_shared) == chosen


@pytest.mark.parametrize(
    ("setting", "device", "any_shared", "words"),
    [
        ("nccl", "cpu", False, "nccl, which needs CUDA devices; use shm or gloo"),
        ("symm_mem", "cpu", False, "symm_mem, which needs CUDA devices; use shm or gloo"),
        ("shm", "cuda", False, "shm, which joins CPU ranks only; use nccl or symm_mem"),
        ("nccl", "cuda", True, "nccl, which refuses ranks that share a GPU; use symm_mem"),
        ("ncll", "cuda", False, "ncll; expected auto or one of shm, gloo, nccl, symm_mem"),
    ],
)
def test_an_all_reduce_that_cannot_work_there_is_refused(
    setting: str, device: str, any_shared: bool, words: str
) -> None:
    with pytest.raises(ConfigError, match=f"parallel.all_reduce is {words}"):
        choose_all_reduce(setting, device, any_shared)


def test_gpus_sum_over_their_links_where_they_have_them() -> None:
    assert choose_all_reduce("auto", "cuda", are_linked=True) == "symm_mem"
    assert choose_all_reduce("auto", "cuda", are_linked=False) == "nccl"
    assert choose_all_reduce("nccl", "cuda", are_linked=True) == "nccl"
    with pytest.raises(ConfigError, match=r"symm_mem, and the GPUs .* \(NVLink\); use nccl"):
        choose_all_reduce("symm_mem", "cuda", are_linked=False)


class Driver:
    """What the driver says of pairs of GPUs: 0 and 1 are linked, 2 is not, and there is no other."""

    def __call__(self, name: str) -> Driver:
        return self

    def cuDeviceGetP2PAttribute(self, value: Any, attribute: int, first: int, second: int) -> int:  # noqa: N802
        value._obj.value = int(attribute == 3 and {first, second} == {0, 1})
        return 0 if max(first, second) < 3 else 101


def test_the_driver_says_which_gpus_are_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", Driver())
    assert [are_gpus_linked(num_gpus) for num_gpus in (1, 2, 3, 4)] == [True, True, False, False]


def test_without_a_driver_no_gpus_are_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert not are_gpus_linked(2)


def test_multicast_is_off_and_devices_overlap_only_where_ranks_may_share_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overlap, multicast = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    env = {"PATH": "/bin"}
    monkeypatch.setattr("os.environ", env)
    prepare_shared_memory(ParallelConfig())
    assert env == {"PATH": "/bin", multicast: "1"}
    prepare_shared_memory(ParallelConfig(allow_shared_gpu=True))
    assert env == {"PATH": "/bin", multicast: "1", overlap: "1"}


def test_mps_is_seen_by_its_pipe(tmp_path: Path) -> None:
    env = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert not is_mps_running(env)
    (tmp_path / "control").touch()
    assert is_mps_running(env)


def test_what_is_kept_lies_where_the_user_keeps_caches() -> None:
    home = {"HOME": "/home/someone"}
    assert cache_folder({"XDG_CACHE_HOME": "/somewhere", **home}) == Path("/somewhere/tprt")
    assert cache_folder({"XDG_CACHE_HOME": "", **home}) == Path("/home/someone/.cache/tprt")
    assert cache_folder({}) == Path(tempfile.gettempdir()) / f"tprt-cache-{os.getuid()}"
