"""What `tprt doctor` makes of devices that this machine need not have; tests/gpu has real ones."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cuda_devices import CudaDevice, look_at_devices
from launch.doctor import heard
from launch.doctor.attention import judge_kernels
from launch.doctor.finding import Finding, Verdict
from launch.doctor.gpus import check_gpus
from launch.doctor.memory import check_memory
from launch.doctor.ranks import check_all_reduce
from tests.support.checkpoint_layouts import QWEN3_600M
from tests.support.deployments import descendants, still_there
from tests.support.doctoring import Rows, request_for, run_check
from tests.support.fake_gpus import build_fakes, needs_compiler

pytestmark = needs_compiler
GIB = 2**30
# In which the process that tries the devices has to say something on a busy machine.
ENOUGH_S = 20.0
See = Callable[..., Rows]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fakes(tmp_path_factory.mktemp("fakes"))


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, libraries: Path) -> Iterator[See]:
    """Look at a host with so many devices and these faults, and predict the memory of its ranks."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_600M))
    monkeypatch.setattr("launch.cuda_driver.LIBRARY", str(libraries / "libcuda.so.1"))
    monkeypatch.setattr("launch.doctor.nccl._NAME", str(libraries / "libnccl.so.2"))
    monkeypatch.setattr("launch.doctor.nccl._IN_PACKAGES", Path("nowhere"))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = set(descendants(os.getpid()))

    def look(
        num_devices: int,
        num_ranks: int,
        faults: str = "",
        within_s: float = ENOUGH_S,
        **sections: Any,
    ) -> Rows:
        monkeypatch.setenv("FAKE_CUDA_DEVICES", str(num_devices))
        monkeypatch.setenv("FAKE_CUDA_FAULTS", faults)
        sections["parallel"] = {"tensor_parallel_size": num_ranks} | sections.get("parallel", {})
        sections["runtime"] = {"device": "cuda"} | sections.get("runtime", {})
        request = replace(request_for(tmp_path, **sections), end_s=time.monotonic() + within_s)
        rows = run_check(check_gpus, request)
        request = replace(request, gpus=rows["devices"].details)
        return rows | run_check(check_memory, request)

    yield look
    assert still_there([pid for pid in descendants(os.getpid()) if pid not in before]) == []


def told(row: Finding) -> tuple[Verdict, str]:
    return row.verdict, row.found


def test_a_device_for_each_rank_is_well_and_the_kv_blocks_are_predicted(see: See) -> None:
    rows = see(3, 2)
    assert {row.verdict for row in rows.values()} == {Verdict.OK}
    assert rows["devices"].found == "2 x Fake GPU with 80.00 GiB for 2 ranks; 3 visible"
    assert rows["devices"].details["capabilities"] == [(9, 0), (9, 0)]
    assert rows["computing"].found == "kernels run on 2 devices"
    assert rows["peer copies"].details["pairs"] == rows["peer copies"].details["direct"] == 2
    assert rows["all-reduce nccl"].found.startswith("NCCL 2.27.5: 2 devices met and summed in ")
    assert "rank 1 0.56 GiB of weights on 80.00 GiB" in rows["memory"].found
    assert isinstance(rows["memory"].details["num_tokens"], int)
    assert rows["memory"].details["num_tokens"] > 10**6


def test_eight_devices_copy_between_all_pairs_and_sum_in_groups_of_every_size(see: See) -> None:
    rows = see(8, 8)
    assert {row.verdict for row in rows.values()} == {Verdict.OK}
    assert rows["peer copies"].details["pairs"] == 56
    assert rows["all-reduce nccl, fewer"].details["world_sizes"] == [2, 3, 4, 5, 6, 7]


def test_fewer_devices_than_ranks_are_named_and_the_memory_is_predicted_all_the_same(see: See) -> None:
    rows = see(1, 2)
    assert (rows["devices"].verdict, rows["memory"].verdict) == (Verdict.BAD, Verdict.OK)
    assert rows["devices"].fix.startswith("lower parallel.tensor_parallel_size")


def test_no_device_is_named_where_one_is_asked_for(see: See) -> None:
    rows = see(0, 1)
    assert told(rows["devices"])[0] is Verdict.BAD
    assert "need a CUDA device each, but 0 are visible" in rows["devices"].found
    assert rows["memory"].verdict is Verdict.SKIPPED


def test_the_ranks_of_all_replicas_need_a_device_each(see: See) -> None:
    two = {"data_parallel_size": 2}
    assert see(3, 2, parallel=two)["devices"].verdict is Verdict.BAD
    rows = see(4, 2, parallel=two)
    assert rows["devices"].found == "4 x Fake GPU with 80.00 GiB for 4 ranks; 4 visible"
    assert rows["computing"].found == "kernels run on 4 devices"
    assert rows["all-reduce nccl"].details["world_size"] == 2


def test_ranks_that_may_share_a_device_get_a_part_of_it_and_do_not_sum_by_nccl(see: See) -> None:
    rows = see(1, 2, parallel={"allow_shared_gpu": True})
    assert rows["devices"].verdict is Verdict.OK
    assert "on 40.00 GiB" in rows["memory"].found
    assert "all-reduce nccl" not in rows


def test_unlike_devices_with_equal_shares_are_a_warning(see: See) -> None:
    row = see(2, 2, "small:1")["devices"]
    assert (row.verdict, "parallel.rank_weights: auto" in row.fix) == (Verdict.WARNING, True)
    assert see(2, 2, "small:1", parallel={"rank_weights": "auto"})["devices"].verdict is Verdict.OK


def test_memory_that_others_have_is_named_with_its_device(see: See) -> None:
    row = see(2, 2, "half-taken:1")["device memory"]
    assert (row.verdict, "0: 0.00 GiB, 1: 39.50 GiB" in row.found) == (Verdict.WARNING, True)
    assert see(2, 1, "half-taken:1")["device memory"].verdict is Verdict.OK


def test_devices_on_which_no_kv_block_fits_are_bad(see: See) -> None:
    row = see(1, 1, cache={"memory_fraction": 0.01})["memory"]
    assert (row.verdict, "no KV block fits on ranks [0]" in row.found) == (Verdict.BAD, True)


@pytest.mark.parametrize(
    ("faults", "name", "found"),
    [
        (
            "init-fails",
            "devices",
            "initialising the driver: cuInit: CUDA_ERROR_SYSTEM_NOT_READY (system not yet initialized)",
        ),
        (
            "open-fails:2",
            "devices",
            "opening device 2: cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY (something is wrong)",
        ),
        ("kernel-wrong:2", "computing", "wrong results on device 2"),
        ("copy-wrong:1-3", "peer copies", "what arrived is not what was written: device 1 to 3"),
        ("sum-wrong", "all-reduce nccl", "NCCL 2.27.5: the sum over 4 devices is wrong"),
        (
            "sum-fails-from-3",
            "all-reduce nccl",
            "the sum over 4 devices by NCCL: ncclCommInitAll: unhandled system error: no space in /dev/shm",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_the_library_says(
    see: See, faults: str, name: str, found: str
) -> None:
    rows = see(4, 4, faults)
    assert told(rows[name]) == (Verdict.BAD, found)
    assert rows[name].fix
    if faults == "sum-fails-from-3":
        assert rows[f"{name}, fewer"].found.endswith("no space in /dev/shm; 2 devices work")


def test_a_device_that_kills_the_process_is_named(see: See) -> None:
    row = see(4, 4, "open-crashes:2")["devices"]
    assert row.verdict is Verdict.BAD
    assert row.found.startswith("the process that tries the devices ended by signal 9: ")
    assert "opening device 2 for " in row.found


@pytest.mark.parametrize(
    ("faults", "name", "found"),
    [
        ("open-hangs:2", "devices", "no answer: opening device 2 for "),
        ("kernel-hangs:2", "computing", "no answer: a kernel on device 2 for "),
        ("copy-hangs:1-3", "peer copies", "no answer: the copy from device 1 to 3 for "),
    ],
)
def test_what_hangs_while_its_like_have_ended_is_bad(
    see: See, monkeypatch: pytest.MonkeyPatch, faults: str, name: str, found: str
) -> None:
    monkeypatch.setattr(heard, "_STANDS_STILL_S", 1.0)
    row = see(4, 4, faults, within_s=5.0)[name]
    assert (row.verdict, row.found[: len(found)]) == (Verdict.BAD, found)
    # In which order pairs copy is not fixed, and those with a device of this one wait for it.
    assert row.found.endswith(" like it ended" if name == "peer copies" else " s; 3 like it ended")


@pytest.mark.parametrize(
    ("faults", "name", "doing"),
    [
        ("init-hangs", "devices", "initialising the driver for "),
        ("open-hangs:0,open-hangs:1", "devices", "opening device 0 for "),
        ("sum-hangs", "all-reduce nccl", "the sum over 2 devices by NCCL for "),
    ],
)
def test_what_may_only_be_slow_is_a_warning_that_says_how_far_it_came(
    see: See, monkeypatch: pytest.MonkeyPatch, faults: str, name: str, doing: str
) -> None:
    row = see(2, 2, faults, within_s=3.0)[name]
    assert row.verdict is Verdict.WARNING
    assert f" s were not enough: {doing}" in row.found
    assert row.fix.startswith("try again with --timeout-s 60")
    monkeypatch.setattr(heard, "_HANGS_S", 0.5)
    assert see(2, 2, faults, within_s=3.0)[name].verdict is Verdict.BAD


def test_devices_that_are_opened_at_the_same_time_take_no_longer_than_one(see: See) -> None:
    rows = see(8, 8, "open-slow", within_s=8.0)
    assert told(rows["devices"])[0] is Verdict.OK
    assert rows["devices"].details["seconds"] < 8


def test_a_driver_that_cannot_compile_is_no_fault(see: See) -> None:
    rows = see(2, 2, "no-compiler")
    assert rows["computing"].verdict is Verdict.SKIPPED
    assert rows["peer copies"].verdict is Verdict.OK


def test_a_machine_without_nccl_is_no_fault(see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.doctor.nccl._NAME", "libnccl-that-is-not-there.so")
    assert see(2, 2)["all-reduce nccl"].verdict is Verdict.SKIPPED


def test_a_machine_without_a_driver_is_named(see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.cuda_driver.LIBRARY", "libcuda-that-is-not-there.so")
    row = see(2, 2)["devices"]
    assert (row.verdict, "the library of the driver cannot be loaded" in row.found) == (Verdict.BAD, True)


def test_all_devices_are_looked_at_by_the_driver_alone(see: See) -> None:
    see(2, 1, "half-taken:1")
    free, taken = look_at_devices()
    assert free == CudaDevice("Fake GPU", 80 * GIB, 80 * GIB - GIB // 2)
    assert taken.free == 40 * GIB


def test_cpu_ranks_look_at_no_device(see: See) -> None:
    rows = see(2, 2, "init-hangs", runtime={"device": "cpu"})
    assert {rows[name].verdict for name in ("devices", "peer copies")} == {Verdict.SKIPPED}


def test_no_sum_is_tried_on_devices_that_are_not_known() -> None:
    request = request_for(runtime={"device": "cuda"}, parallel={"tensor_parallel_size": 2})
    assert run_check(check_all_reduce, request)["all-reduce"].verdict is Verdict.SKIPPED


@pytest.mark.parametrize(
    ("built_for", "capability", "verdict"),
    [
        (["sm_80", "sm_90"], (9, 0), Verdict.OK),
        (["sm_80"], (8, 9), Verdict.OK),
        (["sm_90"], (8, 9), Verdict.BAD),
        (["sm_80"], (9, 0), Verdict.BAD),
        (["sm_80", "compute_80"], (12, 0), Verdict.OK),
        (["sm_90a"], (10, 0), Verdict.BAD),
        ([], (9, 0), Verdict.SKIPPED),
    ],
)
def test_torch_is_built_for_the_devices_or_not(
    built_for: list[str], capability: tuple[int, int], verdict: Verdict
) -> None:
    assert judge_kernels([capability], built_for).verdict is verdict
