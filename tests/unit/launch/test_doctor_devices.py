"""What `tprt doctor` makes of devices that this machine need not have; tests/gpu has real ones."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cuda_devices import CudaDevice
from launch.devices import RankDevice, place_on_gpu
from launch.doctor import devices, peers
from launch.doctor.devices import check_devices
from launch.doctor.finding import Finding, Verdict
from launch.doctor.peers import check_peers
from launch.doctor.request import DoctorRequest
from tests.support.checkpoint_layouts import QWEN3_600M
from tests.support.doctoring import Rows, request_for, run_check

GIB = 2**30
WAIT_S = 30.0
FREE = CudaDevice("NVIDIA H100", 80 * GIB, 79 * GIB)
TAKEN = CudaDevice("NVIDIA H100", 80 * GIB, 60 * GIB)
SMALL = CudaDevice("NVIDIA L4", 24 * GIB, 23 * GIB)
See = Callable[..., Rows]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> See:
    """Look at a host with other devices than this one's; what is done on a device is left out."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_600M))

    def look(found: Sequence[CudaDevice], num_ranks: int, **sections: dict[str, Any]) -> Rows:
        def choose(setting: str, local_rank: int, local_world_size: int, allow_shared_gpu: bool) -> RankDevice:
            return place_on_gpu(local_rank, local_world_size, len(found), allow_shared_gpu)

        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(devices, "choose_device", choose)
        monkeypatch.setattr(devices, "_open", lambda index: (found[index], True))
        sections["parallel"] = {"tensor_parallel_size": num_ranks} | sections.get("parallel", {})
        return run_check(check_devices, request_for(tmp_path, runtime={"device": "cuda"}, **sections))

    return look


def test_a_device_for_each_rank_is_well_and_the_kv_blocks_are_predicted(see: See) -> None:
    rows = see([FREE, FREE, FREE], 2)
    assert {row.verdict for name, row in rows.items() if name != "attention"} == {Verdict.OK}
    assert rows["devices"].found == "2 x NVIDIA H100 with 80.00 GiB for 2 ranks; 3 visible"
    assert rows["computing"].found == "kernels run on 2 devices"
    assert "rank 1 0.56 GiB of weights on 80.00 GiB" in rows["memory"].found
    assert isinstance(rows["memory"].details["num_tokens"], int)
    assert rows["memory"].details["num_tokens"] > 10**6


def test_fewer_devices_than_ranks_are_named_and_the_memory_is_predicted_all_the_same(see: See) -> None:
    rows = see([FREE], 2)
    assert (rows["devices"].verdict, rows["memory"].verdict) == (Verdict.BAD, Verdict.OK)
    assert rows["devices"].fix.startswith("lower parallel.tensor_parallel_size")


def test_the_ranks_of_all_replicas_need_a_device_each(see: See) -> None:
    two = {"data_parallel_size": 2}
    assert see([FREE, FREE, FREE], 2, parallel=two)["devices"].verdict is Verdict.BAD
    rows = see([FREE, FREE, FREE, FREE], 2, parallel=two)
    assert rows["devices"].found == "4 x NVIDIA H100 with 80.00 GiB for 4 ranks; 4 visible"
    assert rows["computing"].found == "kernels run on 4 devices"


def test_ranks_that_may_share_a_device_get_a_part_of_it(see: See) -> None:
    rows = see([FREE], 2, parallel={"allow_shared_gpu": True})
    assert rows["devices"].verdict is Verdict.OK
    assert "on 40.00 GiB" in rows["memory"].found


def test_unlike_devices_with_equal_shares_are_a_warning(see: See) -> None:
    row = see([FREE, SMALL], 2)["devices"]
    assert (row.verdict, "parallel.rank_weights: auto" in row.fix) == (Verdict.WARNING, True)
    assert see([FREE, SMALL], 2, parallel={"rank_weights": "auto"})["devices"].verdict is Verdict.OK


def test_memory_that_others_have_is_named_with_its_device(see: See) -> None:
    row = see([FREE, TAKEN], 2)["device memory"]
    assert (row.verdict, "1: 19.50 GiB" in row.found) == (Verdict.WARNING, True)
    assert see([FREE, TAKEN], 1)["device memory"].verdict is Verdict.OK


def test_devices_on_which_no_kv_block_fits_are_bad(see: See) -> None:
    row = see([FREE], 1, cache={"memory_fraction": 0.01})["memory"]
    assert (row.verdict, "no KV block fits on ranks [0]" in row.found) == (Verdict.BAD, True)


def test_a_cuda_that_does_not_work_is_named_with_what_it_says(
    see: See, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", fail)
    rows = run_check(check_devices, request_for(tmp_path, runtime={"device": "cuda"}))
    assert rows["devices"].found == "CUDA does not work: Found no NVIDIA driver on your system"
    assert (rows["devices"].verdict, rows["memory"].verdict) == (Verdict.BAD, Verdict.SKIPPED)


def test_devices_are_not_judged_when_the_import_of_torch_took_all_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    request = request_for(tmp_path, runtime={"device": "cuda"})
    rows = run_check(check_devices, replace(request, end_s=time.monotonic() + 2.0))
    assert (rows["devices"].verdict, rows["memory"].verdict) == (Verdict.WARNING, Verdict.SKIPPED)
    assert "--timeout-s" in rows["devices"].fix


def test_devices_are_not_judged_when_cuda_itself_is_late_but_one_that_hangs_beside_others_is_named(
    see: See, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hang(*_: object) -> None:
        time.sleep(WAIT_S)

    monkeypatch.setattr(devices, "_LONGEST_S", 1.5)
    monkeypatch.setattr(devices, "_LEAST_S", 1.0)
    see([FREE, FREE], 2)
    request = request_for(tmp_path, runtime={"device": "cuda"}, parallel={"tensor_parallel_size": 2})
    opened = devices._open
    monkeypatch.setattr(devices, "_open", lambda index: hang() if index else opened(index))
    row = run_check(check_devices, request)["devices"]
    assert (row.verdict, row.found.startswith("CUDA does not work: device 1: no answer")) == (Verdict.BAD, True)
    monkeypatch.setattr(torch.cuda, "init", hang)
    row = run_check(check_devices, request)["devices"]
    assert (row.verdict, "CUDA was not ready" in row.found) == (Verdict.WARNING, True)
    assert "--timeout-s" in row.fix
    monkeypatch.setattr(devices, "_HANGS_S", 0.1)
    row = run_check(check_devices, request)["devices"]
    assert (row.verdict, row.found.startswith("CUDA hangs: no answer")) == (Verdict.BAD, True)


def heard(*messages: object, timeout_s: float = 30.0, stays: bool = False) -> Finding:
    """Return what is made of what the process of a pair says before it ends or, if it `stays`, says no more."""
    receiver, sender = Pipe(duplex=False)
    with receiver, sender:
        for message in messages:
            sender.send(message)
        if not stays:
            sender.close()
        return peers._hear({(0, 1): receiver}, timeout_s)


def test_copies_that_arrive_are_counted() -> None:
    row = heard((0, 1), (True, True), (1, 0), (False, True))
    assert (row.verdict, row.details) == (Verdict.OK, {"pairs": 2, "direct": 1})


def test_a_pair_whose_copy_does_not_arrive_as_it_was_is_named() -> None:
    row = heard((0, 1), (True, True), (1, 0), (True, False))
    assert row.verdict is Verdict.BAD
    assert row.found == "what arrived is not what was written: device 1 to 0"
    assert "NCCL_P2P_DISABLE=1" in row.fix


def test_a_pair_that_kills_or_hangs_the_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(peers, "_LEAST_S", 0.1)
    assert heard((0, 1), (True, True), (1, 0)).found == "device 1 to 0: the process died"
    row = heard((0, 1), timeout_s=0.1, stays=True)
    assert (row.verdict, row.found) == (Verdict.BAD, "device 0 to 1: nothing arrived in 0.1 s")


def test_a_pair_that_the_end_of_all_checks_cuts_short_is_not_blamed() -> None:
    row = heard((0, 1), (True, True), (1, 0), timeout_s=0.1, stays=True)
    assert row.verdict is Verdict.SKIPPED
    assert row.found.startswith("1 of 2 pairs of devices are well; for the rest no time was left")
    assert heard((0, 1), (True, False), (1, 0), timeout_s=0.1, stays=True).verdict is Verdict.BAD


def test_an_error_of_cuda_is_passed_on() -> None:
    assert heard((0, 1), "CUDA error: peer mapping").found == "device 0 to 1: CUDA error: peer mapping"
    assert heard().found == "device 0 and 1, before the first copy: the process died"


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> DoctorRequest:
    """A request on a host with four devices, on which nothing is done."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(devices, "choose_device", lambda *arguments: None)
    return request_for(runtime={"device": "cuda"}, parallel={"tensor_parallel_size": 4})


def test_all_devices_are_opened_at_the_same_time(
    four_gpus: DoctorRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = get_context("fork").Barrier(4, timeout=WAIT_S)

    def open_(index: int) -> tuple[CudaDevice, bool]:
        met.wait()
        return FREE, index != 2

    monkeypatch.setattr(devices, "_open", open_)
    rows = run_check(check_devices, four_gpus)
    assert rows["devices"].found == "4 x NVIDIA H100 with 80.00 GiB for 4 ranks; 4 visible"
    assert rows["computing"].found == "wrong results on device 2"


def test_a_device_that_cannot_be_opened_is_named(
    four_gpus: DoctorRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_(index: int) -> tuple[CudaDevice, bool]:
        if index == 1:
            raise RuntimeError("uncorrectable ECC error")
        return FREE, True

    monkeypatch.setattr(devices, "_open", open_)
    row = run_check(check_devices, four_gpus)["devices"]
    assert (row.verdict, row.found) == (Verdict.BAD, "CUDA does not work: device 1: uncorrectable ECC error")


def test_all_pairs_copy_at_the_same_time_and_what_is_wrong_with_each_is_told(
    four_gpus: DoctorRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = get_context("fork").Barrier(6, timeout=WAIT_S)

    def copy(source: int, target: int) -> tuple[bool, bool]:
        if source < target:
            met.wait()
        return True, (source, target) != (3, 1)

    monkeypatch.setattr(peers, "_copy", copy)
    row = run_check(check_peers, four_gpus)["peer copies"]
    assert (row.verdict, row.found) == (Verdict.BAD, "what arrived is not what was written: device 3 to 1")
    monkeypatch.setattr(peers, "_copy", lambda source, target: (source != 0, True))
    row = run_check(check_peers, four_gpus)["peer copies"]
    assert (row.verdict, row.details) == (Verdict.OK, {"pairs": 12, "direct": 9})


def test_a_pair_that_still_opens_its_devices_at_the_end_is_not_blamed(
    four_gpus: DoctorRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: signal.pause() if device == 3 else None)
    monkeypatch.setattr(peers, "_copy", lambda source, target: (True, True))
    monkeypatch.setattr(peers, "_LONGEST_S", 1.0)
    row = run_check(check_peers, four_gpus)["peer copies"]
    assert (row.verdict, row.found[:24]) == (Verdict.SKIPPED, "6 of 12 pairs of devices")


def test_cpu_ranks_copy_nothing_between_devices() -> None:
    request = request_for(runtime={"device": "cpu"}, parallel={"tensor_parallel_size": 2})
    assert run_check(check_peers, request)["peer copies"].verdict is Verdict.SKIPPED
