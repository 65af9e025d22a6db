"""The ranks of `tprt bench load`: starts their processes, has them load together, and ends them.

Knows nothing of what is measured beside the wall time and of how it is shown.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from launch.bench.load_worker import NEWS, ORDERS, PLACES, Loaded, News, Order, Place, Task
from launch.parent_death import PARENT_PID
from launch.program_end import ProgramEnd
from tprt.errors import EngineDeadError

_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 5.0
# From the order to the common start: long enough for it to reach every rank.
_HEAD_START_NS = 20_000_000


@dataclass(frozen=True, slots=True)
class TeamLoad:
    """One loading by all ranks: seconds from the common start until the last was done, and what each says."""

    wall_s: float
    ranks: list[Loaded]


class LoadRanks:
    """The running ranks of one world size."""

    def __init__(self, folder: str, exchange_dir: Path, timeout_s: float) -> None:
        """Prepare to load from `folder` within `timeout_s`; ranks meet in the private `exchange_dir`."""
        self._folder = folder
        self._exchange_dir = exchange_dir
        self._timeout_s = timeout_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._num_tasks = 0

    @property
    def pids(self) -> list[int]:
        """The processes, by rank."""
        return [process.pid for process in self._processes]

    def start(self, world_size: int) -> None:
        """Start them and wait until each has imported what it needs."""
        # Without OpenBLAS's threads, which numpy starts and nobody needs here, a rank has one when it forks.
        environment = {**os.environ, PARENT_PID: str(os.getpid()), "OPENBLAS_NUM_THREADS": "1"}
        for rank in range(world_size):
            ours, theirs = Pipe()
            self._connections.append(ours)
            with theirs:
                place = Place(rank, world_size, self._folder, theirs.fileno())
                command = [sys.executable, "-m", "launch.bench.load_worker", PLACES.dump_json(place).decode()]
                self._processes.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
                    )
                )
        self._hear_all("start", _START_TIMEOUT_S)

    def load(self, method: str, sums: bool, prepare: Callable[[], None]) -> TeamLoad:
        """Let every rank build its model, call `prepare`, and let all load at the same time.

        Raises:
            EngineDeadError: a rank failed, or is late.
        """
        self._num_tasks += 1
        exchange = str(self._exchange_dir / f"load-{self._num_tasks}.sock")
        self._tell_all(Order(task=Task(method, exchange, self._timeout_s, sums)))
        self._hear_all(f"build the model for {method}", _START_TIMEOUT_S)
        prepare()
        start_ns = time.monotonic_ns() + _HEAD_START_NS
        self._tell_all(Order(start_ns=start_ns))
        news = self._hear_all(f"load by {method}", self._timeout_s)
        loaded = [one.loaded for one in news if one.loaded is not None]
        assert len(loaded) == len(news), "every rank that has not failed has measured"
        return TeamLoad((max(one.end_ns for one in loaded) - start_ns) / 1e9, loaded)

    def kill(self) -> None:
        """End all of them and release everything."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for connection in self._connections:
            connection.close()

    def _tell_all(self, order: Order) -> None:
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(ORDERS.dump_json(order))
            except BrokenPipeError as error:
                raise self._lost(rank, "listen") from error

    def _hear_all(self, what: str, timeout_s: float) -> Sequence[News]:
        deadline_s = time.monotonic() + timeout_s
        return [self._hear(rank, what, deadline_s) for rank in range(len(self._connections))]

    def _hear(self, rank: int, what: str, deadline_s: float) -> News:
        connection = self._connections[rank]
        if not connection.poll(max(0.0, deadline_s - time.monotonic())):
            raise EngineDeadError(f"rank {rank} of the load bench has not managed to {what} in time")
        try:
            news = NEWS.validate_json(connection.recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            raise self._lost(rank, what) from error
        if news.failure is not None:
            raise EngineDeadError(f"rank {rank} of the load bench did not {what}: {news.failure}")
        return news

    def _lost(self, rank: int, what: str) -> EngineDeadError:
        # Its end of the pipe is closed, so it is gone or about to go.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[rank].wait(_END_TIMEOUT_S)
        exit_code = self._processes[rank].returncode
        return EngineDeadError(f"rank {rank} of the load bench ended with {exit_code}; it was to {what}")


@contextmanager
def running_ranks(ranks: LoadRanks, world_size: int) -> Iterator[None]:
    """Start the ranks, and leave none of them behind, not on SIGTERM either."""
    end = ProgramEnd(ranks.kill)
    end.guard()
    try:
        ranks.start(world_size)
        yield
    finally:
        ranks.kill()
        end.release()
