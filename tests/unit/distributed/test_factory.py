"""The factory: nothing for one rank, shared memory between CPU ranks, and a refusal where it cannot work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tprt.distributed.factory import CollectiveBackend, GroupDeadlines, make_group
from tprt.distributed.tuning import tune_all_reduce
from tprt.errors import TransportError

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["shm", "gloo", "nccl", "symm_mem"])
def test_one_rank_needs_no_directory_and_no_backend(backend: CollectiveBackend) -> None:
    group = make_group(backend, 0, 1, CPU, "/nowhere", GroupDeadlines(1.0, 1.0))
    assert group.min_int(3) == 3
    assert group.capturable


@pytest.mark.usefixtures("no_descriptor_is_left")
def test_cpu_ranks_meet_in_the_run_directory_and_sum(
    tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    def work(rank: int, _: None) -> float:
        group = make_group("shm", rank, 3, CPU, str(tmp_path), GroupDeadlines(10.0, 10.0))
        assert not group.capturable
        tune_all_reduce(group, tmp_path / "nothing")
        total = group.all_reduce(torch.tensor([2.0**rank])).item()
        group.barrier()
        group.close()
        return total

    assert run_ranks([None] * 3, work) == [7.0] * 3
    assert not (tmp_path / "nothing").exists(), "only symm_mem has something to measure"


@pytest.mark.parametrize(
    ("backend", "device"), [("nccl", "cpu"), ("symm_mem", "cpu"), ("shm", "cuda:0"), ("gloo", "meta")]
)
def test_a_backend_that_does_not_fit_the_device_is_refused(
    backend: CollectiveBackend, device: str, tmp_path: Path
) -> None:
    with pytest.raises(TransportError, match=f"backend {backend} on device {device}: it works on"):
        make_group(backend, 0, 2, torch.device(device), str(tmp_path), GroupDeadlines(1.0, 1.0))
