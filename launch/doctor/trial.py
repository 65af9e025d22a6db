"""Ranks that are tried out: forked processes that meet and sum in groups of several sizes, one after another.

Knows nothing of verdicts.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from launch.cuda_devices import gpu_in_turn
from launch.doctor.forked import end_children, fork_child
from launch.doctor.leftovers import removing_files_of
from tprt.distributed.factory import CollectiveBackend, GroupDeadlines, make_group

_NUM_ELEMENTS = 65536
_MODULUS = 97
# No group is judged that had less.
LEAST_S = 1.0


@dataclass(frozen=True, slots=True)
class Trial:
    """Ranks that sum by `backend` on `num_gpus` CUDA devices, or on the CPU if 0, and meet in `folder`."""

    backend: CollectiveBackend
    num_gpus: int
    folder: Path

    def run(self, sizes: Sequence[int], timeout_s: float) -> Generator[tuple[int, str]]:
        """Yield each size with what went wrong in a group of it ("": nothing), up to the first that failed.

        Sizes for which there is no time left are not tried, but the first is.

        Args:
            sizes: numbers of ranks; a group of `size` has ranks 0 to `size - 1`.
            timeout_s: for all groups together, in seconds.
        """
        end_s = time.monotonic() + timeout_s
        with _ranks(self, sizes, end_s) as connections:
            for size in sizes:
                if size != sizes[0] and end_s - time.monotonic() < LEAST_S:
                    return
                problem = _hear(connections[:size], end_s)
                yield size, problem
                if problem:
                    return

    def play(self, rank: int, sizes: Sequence[int], end_s: float, connection: Connection) -> None:
        """Be a rank: say of each group what went wrong."""
        try:
            torch.set_num_threads(1)
            device = self._take_device(rank, max(sizes))
            for size in sizes:
                if rank < size:
                    connection.send(self._sum(rank, size, device, end_s))
        except Exception as error:  # noqa: BLE001 - the outermost frame
            connection.send(f"{type(error).__name__}: {error}")
        # To end would be the signal to others that this rank is lost.
        signal.pause()

    def _take_device(self, rank: int, num_ranks: int) -> torch.device:
        if not self.num_gpus:
            return torch.device("cpu")
        device = torch.device("cuda", gpu_in_turn(rank, num_ranks, self.num_gpus)[0])
        torch.cuda.set_device(device)
        return device

    def _sum(self, rank: int, size: int, device: torch.device, end_s: float) -> str:
        left_s = max(LEAST_S, end_s - time.monotonic())
        folder = self.folder / f"{self.backend}-{size}"
        folder.mkdir(exist_ok=True)
        group = make_group(self.backend, rank, size, device, str(folder), GroupDeadlines(left_s, left_s))
        own = torch.arange(_NUM_ELEMENTS, device=device, dtype=torch.float32) % _MODULUS
        expected = own * size + size * (size - 1) / 2
        found = group.all_reduce(own + rank)
        is_right = bool(torch.equal(found, expected))
        group.barrier()
        group.close()
        return "" if is_right else f"the sum over {size} ranks is wrong"


@contextlib.contextmanager
def _ranks(trial: Trial, sizes: Sequence[int], end_s: float) -> Iterator[list[Connection]]:
    """Start the ranks, and end them; what each has to say comes through its connection."""
    connections: list[Connection] = []
    pids: list[int] = []
    try:
        for rank in range(max(sizes, default=0)):
            receiver, sender = Pipe(duplex=False)
            connections.append(receiver)
            pids.append(fork_child(partial(trial.play, rank, sizes, end_s, sender)))
            sender.close()
        yield connections
    finally:
        with removing_files_of(pids):
            end_children(pids)
        for connection in connections:
            connection.close()


def _hear(connections: Sequence[Connection], end_s: float) -> str:
    """Return what went wrong in a group of the ranks behind `connections`, once all have said."""
    silent = dict(enumerate(connections))
    while silent:
        ready = wait(list(silent.values()), max(0.0, end_s - time.monotonic()))
        for rank in [rank for rank, connection in silent.items() if connection in ready]:
            if problem := _receive(silent.pop(rank)):
                return f"rank {rank} of {len(connections)}: {problem}"
        if not ready:
            names = ", ".join(map(str, silent))
            return f"of {len(connections)} ranks, {names} gave no answer"
    return ""


def _receive(connection: Connection) -> str:
    try:
        return str(connection.recv())
    except EOFError:
        return "its process died"
