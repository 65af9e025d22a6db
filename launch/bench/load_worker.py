"""One rank of `tprt bench load`: `python -m launch.bench.load_worker`, started by the bench.

It imports what is needed and then forks a process for each measurement, so that each fills memory that is new
to it, as a start does, and none waits for imports. That process builds the rank's part of the model, says so,
loads at the time that it is told, and reports. Knows nothing of other ranks and of how results are shown.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import nn

from launch.bench.disk_reads import disk_bytes_read, peak_memory_bytes, reset_peak_memory
from launch.bench.load_peers import installed_peers
from launch.devices import threads_per_rank
from launch.parent_death import PARENT_PID, die_with_parent
from tprt.attention import make_attention_backend
from tprt.checkpoint_config import read_checkpoint_config
from tprt.distributed import TPGroup
from tprt.models import ModelParts, build_model
from tprt.sharding import make_shard_plan, shape_of
from tprt.weights import join_load_exchange, load_model

TPRT = "tprt"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank of how many, the checkpoint, and the pipe to the bench; travels in the first argument."""

    rank: int
    world_size: int
    folder: str
    fd: int


@dataclass(frozen=True, slots=True)
class Task:
    """One measurement.

    Attributes:
        method: `tprt`, or a peer's name.
        exchange: path where ranks that load by tprt meet; used once.
        timeout_s: no wait of theirs is longer.
        sums: whether to sum up what the parameters hold afterwards, to compare the methods.
    """

    method: str
    exchange: str
    timeout_s: float
    sums: bool


@dataclass(frozen=True, slots=True)
class Order:
    """What the bench sends: first a task, and then, when every rank is ready, the time to start."""

    task: Task | None = None
    start_ns: int = 0


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one rank measured.

    Attributes:
        end_ns: monotonic time when the last element was in place.
        read_bytes: what it asked for by its own account.
        own_read_bytes, own_kept_bytes: the part of that for tensors of which no other rank needs the same
            bytes, and what was kept of it; None for peers, which make no difference.
        disk_bytes: what the kernel fetched from disks for it; None where it does not count.
        peak_bytes: most resident memory while it loaded.
        shard_bytes: size of its parameters.
        checksum: of all parameters, or 0.
    """

    end_ns: int
    read_bytes: int
    own_read_bytes: int | None
    own_kept_bytes: int | None
    disk_bytes: int | None
    peak_bytes: int
    shard_bytes: int
    checksum: int = 0


@dataclass(frozen=True, slots=True)
class News:
    """What a rank sends: that it is ready, what it measured, or how it failed."""

    loaded: Loaded | None = None
    failure: str | None = None


ORDERS = TypeAdapter(Order)
NEWS = TypeAdapter(News)
PLACES = TypeAdapter(Place)


def play_rank(place: Place, connection: Connection) -> None:
    """Do one task after another, each in a process of its own, until the bench closes the pipe."""
    # Peers that are imported when first asked for are imported now.
    installed_peers()
    _send(connection, News())
    while (task := _next_task(connection)) is not None:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            os.environ[PARENT_PID] = str(parent)
            die_with_parent()
            _play_task(place, task, connection)
        _, status = os.waitpid(child, 0)
        if status:
            _send(connection, News(failure=f"ended with {os.waitstatus_to_exitcode(status)}"))


def _next_task(connection: Connection) -> Task | None:
    try:
        return ORDERS.validate_json(connection.recv_bytes()).task
    except EOFError:
        return None


def _play_task(place: Place, task: Task, connection: Connection) -> None:
    """Measure, report and leave."""
    try:
        news = News(loaded=_measure(place, task, connection))
    except Exception as error:  # noqa: BLE001 - the outermost frame of the forked process
        news = News(failure=f"{type(error).__name__}: {error}")
    _send(connection, news)
    os._exit(0)


def _measure(place: Place, task: Task, connection: Connection) -> Loaded:
    torch.set_num_threads(threads_per_rank(place.world_size))
    model = _build(place)
    load = _load_by_tprt if task.method == TPRT else _load_by_peer
    _send(connection, News())
    start_ns = ORDERS.validate_json(connection.recv_bytes()).start_ns
    reset_peak_memory()
    disk_before = disk_bytes_read()
    time.sleep(max(0, start_ns - time.monotonic_ns()) / 1e9)
    read, own_read, own_kept, end_ns = load(model, place, task)
    disk_after = disk_bytes_read()
    return Loaded(
        end_ns=end_ns,
        read_bytes=read,
        own_read_bytes=own_read,
        own_kept_bytes=own_kept,
        disk_bytes=None if disk_before is None or disk_after is None else disk_after - disk_before,
        peak_bytes=peak_memory_bytes(),
        shard_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        checksum=_checksum(model) if task.sums else 0,
    )


def _build(place: Place) -> nn.Module:
    """Allocate this rank's part of the model in the checkpoint's own type; no page of it is touched yet."""
    checkpoint = read_checkpoint_config(place.folder)
    shard = make_shard_plan(shape_of(checkpoint), place.world_size).shards[place.rank]
    group = TPGroup(place.rank, place.world_size)
    parts = ModelParts(checkpoint, shard, group, make_attention_backend("auto", 1.0), max_model_len=1)
    return build_model(parts, _DTYPES.get(checkpoint.dtype, torch.bfloat16), torch.device("cpu"))


def _load_by_tprt(model: nn.Module, place: Place, task: Task) -> tuple[int, int | None, int | None, int]:
    joined = join_load_exchange(task.exchange, place.rank, place.world_size, task.timeout_s)
    with joined or nullcontext() as exchange:
        report = load_model(model, place.folder, exchange)
        end_ns = time.monotonic_ns()
    return report.read_bytes, report.own_read_bytes, report.own_kept_bytes, end_ns


def _load_by_peer(model: nn.Module, place: Place, task: Task) -> tuple[int, int | None, int | None, int]:
    read = installed_peers()[task.method](model, place.folder)
    return read, None, None, time.monotonic_ns()


def _checksum(model: nn.Module) -> int:
    checksum = 0
    for _, parameter in sorted(model.named_parameters()):
        as_bytes: NDArray[np.uint8] = parameter.detach().contiguous().view(torch.uint8).numpy()
        checksum = zlib.crc32(as_bytes.data, checksum)
    return checksum


def _send(connection: Connection, news: News) -> None:
    connection.send_bytes(NEWS.dump_json(news))


def main() -> None:
    """Play the rank in the first argument."""
    die_with_parent()
    # Ctrl-C is for the bench, which ends its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    place = PLACES.validate_json(sys.argv[1])
    try:
        with Connection(place.fd) as connection:
            play_rank(place, connection)
    except BrokenPipeError:
        # The bench is gone.
        sys.exit(1)


if __name__ == "__main__":
    main()
