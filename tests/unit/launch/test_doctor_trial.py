"""Ranks on trial: which group fails is told, by which rank, and no process is left."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from launch.doctor import ranks
from launch.doctor.finding import Verdict
from launch.doctor.forked import EXIT_RAISED, end_child, fork_child
from launch.doctor.ranks import check_all_reduce
from launch.doctor.trial import Trial
from tests.support.deployments import descendants, still_there
from tests.support.doctoring import request_for, run_check

WAIT_S = 30.0
SHM = Path("/dev/shm")
MAPPED: list[mmap.mmap] = []


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    before = set(descendants(os.getpid()))
    yield
    assert still_there([pid for pid in descendants(os.getpid()) if pid not in before]) == []


@dataclass(frozen=True, slots=True)
class Littering(Trial):
    """Each rank has a file in shared memory, as NCCL has until all have opened it."""

    def _sum(self, rank: int, size: int, device: torch.device, end_s: float) -> str:
        file = SHM / f"nccl-test-{os.getppid()}-{rank}"
        file.write_bytes(bytes(mmap.PAGESIZE))
        with file.open("r+b") as opened:
            MAPPED.append(mmap.mmap(opened.fileno(), 0))
        return "" if file.exists() else "the file is gone already"


@dataclass(frozen=True, slots=True)
class Spoilt(Trial):
    """In a group of `bad_size` rank 1 does not do its part, in its own way."""

    bad_size: int = 0
    way: str = ""

    def _sum(self, rank: int, size: int, device: torch.device, end_s: float) -> str:
        if (rank, size) == (1, self.bad_size):
            if self.way == "hangs":
                signal.pause()
            if self.way == "dies":
                os._exit(1)
            raise RuntimeError("no route to rank 0")
        return ""


def test_ranks_sum_in_groups_of_every_size(tmp_path: Path) -> None:
    assert list(Trial("shm", 0, tmp_path).run([4, 2, 3], WAIT_S)) == [(4, ""), (2, ""), (3, "")]


@pytest.mark.parametrize(
    ("way", "timeout_s", "problem"),
    [
        ("hangs", 0.3, "of 2 ranks, 1 gave no answer"),
        ("dies", WAIT_S, "rank 1 of 2: its process died"),
        ("fails", WAIT_S, "rank 1 of 2: RuntimeError: no route to rank 0"),
    ],
)
def test_the_first_group_that_fails_is_the_last_and_its_rank_is_named(
    tmp_path: Path, way: str, timeout_s: float, problem: str
) -> None:
    assert list(Spoilt("shm", 0, tmp_path, 2, way).run([2, 3], timeout_s)) == [(2, problem)]


def test_a_smaller_group_that_fails_comes_after_those_that_do_not(tmp_path: Path) -> None:
    found = list(Spoilt("shm", 0, tmp_path, 3, "fails").run([4, 2, 3], WAIT_S))
    assert found == [(4, ""), (2, ""), (3, "rank 1 of 3: RuntimeError: no route to rank 0")]


def test_what_nccl_leaves_when_a_rank_is_killed_is_removed_and_nothing_else(tmp_path: Path) -> None:
    others = SHM / f"nccl-test-other-{os.getpid()}"
    others.write_bytes(b"x")
    try:
        found = list(Littering("shm", 0, tmp_path).run([2], WAIT_S))
        left = list(SHM.glob(f"nccl-test-{os.getpid()}-*"))
        assert (found, left, others.exists()) == ([(2, "")], [], True)
    finally:
        others.unlink()


def test_a_group_for_which_there_is_no_time_is_not_tried(tmp_path: Path) -> None:
    assert list(Spoilt("shm", 0, tmp_path).run([3, 2], 0.9)) == [(3, "")]


def test_all_ranks_fewer_ranks_and_the_other_backend_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("launch.doctor.ranks._ON_CPU", ("shm",))
    request = request_for(runtime={"device": "cpu"}, parallel={"tensor_parallel_size": 4})
    rows = run_check(check_all_reduce, request)
    assert list(rows) == ["all-reduce shm", "all-reduce shm, fewer"]
    assert rows["all-reduce shm"].verdict is Verdict.OK
    assert rows["all-reduce shm, fewer"].details["world_sizes"] == [2, 3]
    assert list(tmp_path.iterdir()) == []


def test_when_all_ranks_fail_it_is_told_how_many_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("launch.doctor.ranks._ON_CPU", ("shm",))

    def spoil(self: Trial, rank: int, size: int, device: torch.device, end_s: float) -> str:
        return "the sum is wrong" if size > 3 else ""

    monkeypatch.setattr(Trial, "_sum", spoil)
    request = request_for(runtime={"device": "cpu"}, parallel={"tensor_parallel_size": 5})
    rows = run_check(check_all_reduce, request)
    assert rows["all-reduce shm"].verdict is Verdict.BAD
    assert rows["all-reduce shm"].found.endswith("of 5: the sum is wrong")
    assert rows["all-reduce shm, fewer"].verdict is Verdict.WARNING
    assert rows["all-reduce shm, fewer"].found.endswith("of 4: the sum is wrong; 3 ranks work")


def test_ranks_on_gpus_sum_by_their_backend_but_for_nccl_and_a_slow_one_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(ranks, "_ON_CPU", ())

    def run(self: Trial, sizes: Sequence[int], timeout_s: float) -> Iterator[tuple[int, str]]:
        assert (self.backend, self.num_gpus) == ("symm_mem", 4)
        time.sleep(timeout_s)
        yield sizes[0], "of 4 ranks, 1 gave no answer"

    monkeypatch.setattr(Trial, "run", run)
    request = request_for(runtime={"device": "cuda"}, parallel={"tensor_parallel_size": 4})
    linked = replace(request, gpus={"visible": 4, "linked": True}, end_s=time.monotonic() + 3.8)
    row = run_check(check_all_reduce, linked)["all-reduce symm_mem"]
    assert (row.verdict, row.found[:31]) == (Verdict.WARNING, "of 4 ranks, 1 gave no answer in")
    assert "--timeout-s" in row.fix
    late = replace(linked, end_s=time.monotonic() + 3.0)
    assert run_check(check_all_reduce, late)["all-reduce symm_mem"].verdict is Verdict.SKIPPED
    assert run_check(check_all_reduce, replace(request, gpus={"visible": 4, "linked": False})) == {}


def test_a_child_dies_with_the_child_that_forked_it() -> None:
    reader, writer = os.pipe()

    def outer() -> None:
        os.write(writer, fork_child(signal.pause).to_bytes(8, "little"))
        signal.pause()

    pid = fork_child(outer)
    inner = int.from_bytes(os.read(reader, 8), "little")
    end_child(pid)
    os.close(reader)
    os.close(writer)
    assert still_there([inner]) == []


def test_a_child_that_raises_has_an_exit_code_of_its_own() -> None:
    def fail() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        raise ZeroDivisionError

    assert os.waitstatus_to_exitcode(os.waitpid(fork_child(fail), 0)[1]) == EXIT_RAISED
