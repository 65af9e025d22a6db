"""Sums and gathers of ranks on one GPU have the bits of those between CPU ranks, launched and captured."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.bench.allreduce_cuda import run_cuda_allreduce_bench
from tests.support.symm_mem_checks import run_checks
from tprt.distributed.all_reduce_limits import NO_LIMIT

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("mps", "one_gpu")]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_on_one_gpu_sum_and_gather_exactly(tmp_path: Path, world_size: int) -> None:
    limits = run_checks(tmp_path, world_size)
    assert limits.one_shot_bytes > 0
    assert limits.two_shot_bytes == NO_LIMIT


def test_the_bench_measures_both_ways_of_ranks_that_share_a_gpu() -> None:
    rows = run_cuda_allreduce_bench([2], [1024, 65536])
    assert [(row["ranks"], row["gpus"], row["num_bytes"]) for row in rows] == [(2, 1, 1024), (2, 1, 65536)]
    for row in rows:
        assert row["nccl_us"] is row["nccl_eager_us"] is None
        times = [row[f"{way}_us"] for way in ("one_shot", "two_shot", "one_shot_eager", "two_shot_eager")]
        assert all(isinstance(time, float) and time > 0 for time in times)
