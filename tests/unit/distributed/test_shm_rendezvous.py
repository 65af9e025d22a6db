"""How ranks that know only a path find each other: in any order, and with a name for whoever is missing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tprt.distributed.shm_memory import Word, line_start
from tprt.distributed.shm_rendezvous import _HELLO, exchange_memory
from tprt.errors import PeerLostError, TransportError, TransportTimeoutError

RunRanks = Callable[..., list[Any]]

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


@pytest.mark.parametrize("delays_s", [[0.0, 0.0, 0.0], [0.15, 0.0, 0.0], [0.0, 0.1, 0.05], [0.1, 0.05, 0.0]])
def test_ranks_share_memory_in_whatever_order_they_come(
    delays_s: list[float], tmp_path: Path, run_ranks: RunRanks
) -> None:
    path = str(tmp_path / "s")

    def meet(rank: int, delay_s: float) -> tuple[int, int]:
        time.sleep(delay_s)
        memory = exchange_memory(path, rank, 3, 10)
        inode = os.fstat(memory.memory_fd).st_ino
        with memory.map() as mapping, memoryview(mapping) as whole, whole.cast("Q") as words:
            pid = words[line_start((rank + 1) % 3) + Word.PID]
        memory.close()
        return inode, pid

    met = run_ranks(delays_s, meet)
    assert len(set(met)) == 1
    assert met[0][1] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_socket_that_an_earlier_run_left_behind_is_no_obstacle(tmp_path: Path, run_ranks: RunRanks) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)

    def meet(rank: int, delay_s: float) -> None:
        time.sleep(delay_s)
        exchange_memory(path, rank, 2, 10).close()

    run_ranks([0.1, 0.0], meet)


def test_missing_ranks_are_named_to_everyone_at_the_earliest_deadline(
    tmp_path: Path, run_ranks: RunRanks
) -> None:
    path = str(tmp_path / "s")

    def meet(rank: int, timeout_s: float) -> None:
        with pytest.raises(TransportTimeoutError, match=r"rank 2, 3 of 4 did not come"):
            exchange_memory(path, rank, 4, timeout_s)

    start_s = time.monotonic()
    run_ranks([30.0, 0.2], meet)
    assert time.monotonic() - start_s < 5
    assert os.listdir(tmp_path) == []


def test_a_missing_rank_0_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(TransportTimeoutError, match=r"waiting for rank 0 .* it never came"):
        exchange_memory(path, 1, 2, 0.05)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with pytest.raises(TransportTimeoutError, match="nobody listens there: rank 0 has died"):
        exchange_memory(path, 1, 2, 0.05)


def test_a_rank_0_that_goes_away_is_noticed_at_once(tmp_path: Path, run_ranks: RunRanks) -> None:
    path = str(tmp_path / "s")

    def meet(rank: int, _: None) -> None:
        if rank == 0:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen()
                listener.accept()[0].close()
            return
        with pytest.raises(PeerLostError, match="rank 0 went away"):
            exchange_memory(path, rank, 2, 60)

    run_ranks([None, None], meet)


def test_a_rank_that_goes_away_before_the_others_come_is_named_to_all(
    tmp_path: Path, run_ranks: RunRanks
) -> None:
    path = str(tmp_path / "s")

    def meet(rank: int, _: None) -> None:
        if rank == 1:
            time.sleep(0.2)
            say_hello_and_leave(path, rank=1, world_size=4)
            return
        with pytest.raises(PeerLostError, match=r"rank 1 \(process 99\) went away"):
            exchange_memory(path, rank, 4, 60)

    run_ranks([None, None, None], meet)


def say_hello_and_leave(path: str, rank: int, world_size: int) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(_HELLO.pack(rank, world_size, 99, 60.0))


@pytest.mark.parametrize(("claimed", "world_size"), [(1, 2), (0, 3), (7, 3), (1, 4)])
def test_ranks_that_disagree_about_who_they_are_are_told(
    claimed: int, world_size: int, tmp_path: Path, run_ranks: RunRanks
) -> None:
    """Rank 0 expects three ranks; one of them comes first, and then one that does not fit."""
    path = str(tmp_path / "s")

    def meet(number: int, _: None) -> None:
        if number == 2:
            time.sleep(0.2)
            say_hello_and_leave(path, claimed, world_size)
            return
        with pytest.raises(
            TransportError, match=f"as rank {claimed} of {world_size}; expected one each of the ranks"
        ):
            exchange_memory(path, number, 3, 60)

    run_ranks([None, None, None], meet)


def test_a_connection_that_says_nothing_is_ignored(tmp_path: Path, run_ranks: RunRanks) -> None:
    path = str(tmp_path / "s")

    def meet(rank: int, _: None) -> None:
        if rank == 1:
            time.sleep(0.1)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(path)
        exchange_memory(path, rank, 2, 10).close()

    run_ranks([None, None], meet)


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="shorter path"):
        exchange_memory(str(tmp_path / ("x" * 120)), 0, 2, 1)


def test_a_run_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"cannot listen at .*absent.*must exist"):
        exchange_memory(str(tmp_path / "absent" / "s"), 0, 2, 1)
