"""The all-reduce bench: both backends in one run, on real ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from launch.bench.allreduce import bench_ranks, run_allreduce_bench
from launch.bench.allreduce_cuda import run_cuda_allreduce_bench
from tests.support.deployments import TPRT, descendants, start, still_there
from tprt.errors import ConfigError, TransportError

WAIT_S = 60.0


def test_shared_memory_is_measured_beside_gloo_and_is_faster() -> None:
    rows = run_allreduce_bench([2], [2304, 262144])
    assert [(row["ranks"], row["num_bytes"]) for row in rows] == [(2, 2304), (2, 262144)]
    for row in rows:
        assert 0 < row["shm_p50_us"] < row["gloo_p50_us"]
        assert row["shm_p50_us"] <= row["shm_p99_us"]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("readers", "num_bytes"), [([1], [4]), ([2], [2]), ([2], [6])])
def test_a_bench_that_makes_no_sense_is_refused(readers: list[int], num_bytes: list[int]) -> None:
    with pytest.raises(ConfigError, match="multiples of 4 bytes"):
        run_allreduce_bench(readers, num_bytes)


@pytest.mark.parametrize(("readers", "num_bytes"), [([1], [4]), ([2], [0]), ([2], [3])])
def test_a_bench_of_gpus_that_makes_no_sense_is_refused(readers: list[int], num_bytes: list[int]) -> None:
    with pytest.raises(ConfigError, match="multiples of 2 bytes"):
        run_cuda_allreduce_bench(readers, num_bytes)


def test_a_bench_of_gpus_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="no CUDA device is visible; take --device cpu"):
        run_cuda_allreduce_bench([2], [4])


def test_ranks_that_have_all_ended_are_named() -> None:
    with pytest.raises(TransportError, match="rank 0 ended with 1"):
        bench_ranks(os.getpid, 2, [4])  # which takes no argument


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_bench_and_its_ranks_in_silence(
    tmpdir_of_children: Path, number: signal.Signals, exit_code: int
) -> None:
    with start([TPRT, "bench", "allreduce", "--readers", "2"]) as ran:
        deadline_s = time.monotonic() + WAIT_S
        # The third is multiprocessing's own.
        while len(children := descendants(ran.pid)) < 3:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        # As a terminal does it.
        os.killpg(ran.pid, number)
        out, err = ran.communicate(timeout=WAIT_S)
    assert (ran.returncode, out, err) == (exit_code, "", "")
    assert still_there(children) == []
