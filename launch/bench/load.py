"""`tprt bench load`: how long ranks take to fill their parameters, beside peers and beside reading the files.

The ranks are processes. What they import and the models that they fill are there before the clock starts;
memory is new to each measurement, as in a start. All start at one time, and the last to end counts.

* **cold**: right before, the files are dropped from the page cache, and the kernel is asked whether they are
  gone (`cached` in the row is the share that is not).
* **warm**: the files were read before and are in the page cache (`cached` is 1).
* **sequential**: one process reads all files once from end to end in blocks of 8 MiB into the same memory,
  through the cache and past it; the faster of the two is the reference.

Disks of clouds are fast for some gigabytes after a rest. So the disk is read until its rate has settled before
anything is measured; every round measures each method and both references once, in an order that turns from
round to round; and ratios are those of one round, of which the median is taken. Seconds are medians too; bytes
are the most of all rounds. As much memory as the ranks fill is touched and freed right before each measurement,
for a virtual machine may have to get it from its host, which costs whoever comes first. In the first warm round
what the parameters hold is compared between the methods. Knows nothing of how results are shown.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.bench.bench_dir import bench_dir
from launch.bench.disk_reads import (
    cached_share,
    empty_cache,
    fill_cache,
    read_in_one_stream,
    settle_disk,
    settle_memory,
)
from launch.bench.load_peers import installed_peers
from launch.bench.load_ranks import LoadRanks, TeamLoad, running_ranks
from launch.bench.load_worker import TPRT, Loaded
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import Config
from tprt.errors import CheckpointError, ConfigError
from tprt.sharding import make_shard_plan, shape_of
from tprt.weights import open_checkpoint

LoadBenchRow = dict[str, str | int | float | list[int] | list[int | None] | None]

SEQUENTIAL = ("sequential", "sequential direct")
_PEERS_TO_BEAT = ("get_tensor", "get_slice")
_MIN_TIMEOUT_S = 60.0
# A disk that is slower than this for every rank that reads everything is not worth waiting for.
_SLOWEST_BYTES_PER_S = 20e6
_MIB = 2**20
_TITLES = {
    "vs_sequential": "vs\ndisk",
    "vs_get_tensor": "vs\ntensor",
    "vs_get_slice": "vs\nslice",
    "own_read_ratio": "own\nread",
    "node_read_ratio": "all\nread",
    "node_disk_ratio": "disk\nread",
}


@dataclass(slots=True)
class _Measured:
    """All rounds of one method at one world size, cold or warm."""

    loads: list[TeamLoad] = field(default_factory=list)
    cached: list[float | None] = field(default_factory=list)


@dataclass(slots=True)
class _World:
    """What was measured at one world size."""

    world_size: int
    by_method: dict[tuple[str, str], _Measured] = field(default_factory=lambda: defaultdict(_Measured))
    sequential_s: list[tuple[float, float | None]] = field(default_factory=list)


def bench_load(config: Config, counts: Sequence[int], repeats: int) -> list[LoadBenchRow]:
    """Load the checkpoint of `config` on each of `counts` ranks by every method, cold and warm.

    Of the settings only `model.path` matters: ranks have equal shares, on CPUs, in the checkpoint's own type.

    Returns:
        A row for each number of ranks, cold and warm, and method. Lists have an entry for each rank.
        `vs_...` is the wall time over that of the other: of reading the files once (cold rows only), or of a
        peer. `node_read_ratio` is what all ranks asked for together over the size of the tensors, and
        `node_disk_ratio` what the kernel fetched for them; `own_read_ratio`, of tprt alone, is what a rank
        read over what it kept of the tensors of which no other rank needs the same bytes, the worst of all
        ranks. `peak_over_shard_bytes` is the most resident memory less the parameters, of the worst rank.

    Raises:
        ConfigError: no ranks or no rounds were asked for.
        CheckpointError: there is no such checkpoint, or two methods have filled parameters differently.
        ShardPlanError: the model cannot be split over so many ranks.
        EngineDeadError: a rank failed, or is late.
    """
    if repeats < 1 or min(counts) < 1:
        raise ConfigError(f"a load bench on {counts} ranks with {repeats} rounds; expected 1 or more of each")
    folder = config.model.path
    shape = shape_of(read_checkpoint_config(folder))
    for count in counts:
        make_shard_plan(shape, count)
    checkpoint = open_checkpoint(folder)
    files = sorted({entry.file for entry in checkpoint.tensors.values()})
    settle_disk(files)
    return [
        row
        for count in counts
        for row in _rows(_measure_world(folder, files, count, repeats), checkpoint.num_bytes)
    ]


def for_people(row: LoadBenchRow) -> LoadBenchRow:
    """Return what fits on a line of a terminal under titles of two lines: of lists the worst rank, and MiB."""
    short: LoadBenchRow = {name: row[name] for name in ("ranks", "cache", "method", "wall_s")}
    for name, title in _TITLES.items():
        number = row[name]
        short[title] = f"{number:.2f}" if isinstance(number, float) else ""
    over = row["peak_over_shard_bytes"]
    assert isinstance(over, int)
    short["MiB\nover"] = over // _MIB
    return short


def _measure_world(folder: str, files: Sequence[Path], world_size: int, repeats: int) -> _World:
    world = _World(world_size)
    timeout_s = _MIN_TIMEOUT_S + world_size * sum(f.stat().st_size for f in files) / _SLOWEST_BYTES_PER_S
    with bench_dir() as exchange_dir:
        ranks = LoadRanks(folder, Path(exchange_dir), timeout_s)
        with running_ranks(ranks, world_size):
            for number in range(repeats):
                _measure_cold(world, ranks, files, number)
                _measure_warm(world, ranks, files, number)
    return world


def _measure_cold(world: _World, ranks: LoadRanks, files: Sequence[Path], number: int) -> None:
    sequential_s: dict[str, float | None] = {}
    for method in _turned([*SEQUENTIAL, *_methods()], number):
        if method in SEQUENTIAL:
            empty_cache(files)
            sequential_s[method] = read_in_one_stream(files, direct=method == SEQUENTIAL[1])
        else:
            _measure_one(world, "cold", method, ranks, files)
    buffered_s = sequential_s[SEQUENTIAL[0]]
    assert buffered_s is not None, "every file system can read through the page cache"
    world.sequential_s.append((buffered_s, sequential_s[SEQUENTIAL[1]]))


def _measure_warm(world: _World, ranks: LoadRanks, files: Sequence[Path], number: int) -> None:
    loads = {
        method: _measure_one(world, "warm", method, ranks, files, sums=number == 0)
        for method in _turned(_methods(), number)
    }
    reference = loads[_PEERS_TO_BEAT[0]]
    for method, load in loads.items():
        for rank, (one, other) in enumerate(zip(load.ranks, reference.ranks, strict=True)):
            if one.checksum != other.checksum:
                raise CheckpointError(
                    f"rank {rank} of {world.world_size}: {method} has filled the parameters with other bytes"
                    f" than {_PEERS_TO_BEAT[0]}; one of them loads wrongly, or the files have changed"
                )


def _measure_one(
    world: _World, cache: str, method: str, ranks: LoadRanks, files: Sequence[Path], *, sums: bool = False
) -> TeamLoad:
    measured = world.by_method[cache, method]

    def prepare() -> None:
        settle_memory(sum(file.stat().st_size for file in files))
        (empty_cache if cache == "cold" else fill_cache)(files)
        measured.cached.append(cached_share(files))

    load = ranks.load(method, sums, prepare)
    measured.loads.append(load)
    return load


def _methods() -> list[str]:
    return [TPRT, *installed_peers()]


def _turned(items: list[str], number: int) -> list[str]:
    first = number % len(items)
    return items[first:] + items[:first]


def _rows(world: _World, file_bytes: int) -> list[LoadBenchRow]:
    return [_row(world, cache, method, file_bytes) for cache in ("cold", "warm") for method in _methods()]


def _row(world: _World, cache: str, method: str, file_bytes: int) -> LoadBenchRow:
    measured = world.by_method[cache, method]
    walls_s = [load.wall_s for load in measured.loads]
    sequential_s = [min(s for s in pair if s is not None) for pair in world.sequential_s]
    row: LoadBenchRow = {
        "ranks": world.world_size,
        "cache": cache,
        "method": method,
        "rounds": len(walls_s),
        "wall_s": round(statistics.median(walls_s), 3),
        "wall_min_s": round(min(walls_s), 3),
        "wall_max_s": round(max(walls_s), 3),
        "sequential_s": round(statistics.median(sequential_s), 3) if cache == "cold" else None,
        "vs_sequential": _median_ratio(walls_s, sequential_s) if cache == "cold" else None,
    }
    for peer in _PEERS_TO_BEAT:
        peer_s = [load.wall_s for load in world.by_method[cache, peer].loads]
        row[f"vs_{peer}"] = None if peer == method else _median_ratio(walls_s, peer_s)
    return row | _bytes(measured, file_bytes) | {"cached": _cached(measured.cached)}


def _bytes(measured: _Measured, file_bytes: int) -> LoadBenchRow:
    by_rank = list(zip(*(load.ranks for load in measured.loads), strict=True))
    read = [max(one.read_bytes for one in rounds) for rounds in by_rank]
    disk = [_most([one.disk_bytes for one in rounds]) for rounds in by_rank]
    peak = [max(one.peak_bytes for one in rounds) for rounds in by_rank]
    shard = [rounds[0].shard_bytes for rounds in by_rank]
    node_read = max(sum(one.read_bytes for one in load.ranks) for load in measured.loads)
    node_disk = _most([_total([one.disk_bytes for one in load.ranks]) for load in measured.loads])
    return {
        "file_bytes": file_bytes,
        "read_bytes": read,
        "disk_bytes": disk,
        "shard_bytes": shard,
        "peak_bytes": peak,
        "own_read_ratio": _own_read_ratio([one for rounds in by_rank for one in rounds]),
        "node_read_ratio": round(node_read / file_bytes, 3),
        "node_disk_ratio": None if node_disk is None else round(node_disk / file_bytes, 3),
        "peak_over_shard_bytes": max(most - own for most, own in zip(peak, shard, strict=True)),
    }


def _own_read_ratio(loads: Sequence[Loaded]) -> float | None:
    ratios = [
        one.own_read_bytes / one.own_kept_bytes for one in loads if one.own_read_bytes and one.own_kept_bytes
    ]
    return round(max(ratios), 4) if ratios else None


def _median_ratio(times_s: Sequence[float], others_s: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(times_s, others_s, strict=True)), 3)


def _cached(shares: Sequence[float | None]) -> float | None:
    """Return the mean share of the files in the page cache at the start; None where it is not known."""
    known = [share for share in shares if share is not None]
    return round(statistics.mean(known), 4) if len(known) == len(shares) else None


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _most(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return max(known) if len(known) == len(counts) else None
