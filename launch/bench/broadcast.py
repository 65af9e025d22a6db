"""`tprt bench broadcast`: the ring beside what others do, from one writer to readers on this host.

The transports take turns, several each, so that what else the machine does falls on all. One-way latency is the
time of receipt minus the time of sending that the message carries: the monotonic clock is one on a host. It is
taken with pauses in which the readers fall asleep, as they do between steps; messages per second are taken
without. Knows nothing of how the results are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launch.bench.bench_dir import bench_dir
from launch.bench.broadcast_peers import HEAD_BYTES, OURS, TRANSPORTS
from launch.bench.broadcast_team import Heard, Spoken, Team, running
from tprt.errors import ConfigError

BenchRow = dict[str, int | float | str]

_PACED_TURNS = 8
_PACED_MESSAGES = 60
_PACED_SHARE = 0.7
_UNPACED_TURNS = 2
_UNPACED_MESSAGES = 2000
_UNPACED_BYTES = 64 * 1024 * 1024
_WARM_UP_MESSAGES = 10
_WARM_UP_S = 0.1
_MAX_READERS = 64
# Idle readers are woken so often and at this distance, after a silence that is so much longer than a turn.
_WAKE_MESSAGES = 60
_WAKE_GAP_S = 0.02
_SILENCE_FACTOR = 4


@dataclass(frozen=True, slots=True)
class Pace:
    """How to measure.

    Attributes:
        gap_s: mean of the random pause between messages when latency is measured.
        seconds: how long to send in all with each transport, number of readers and size; about.
    """

    gap_s: float = 1e-3
    seconds: float = 0.7


@dataclass
class _Tally:
    """What one transport did with messages of one size."""

    latencies_ns: list[int] = field(default_factory=list)
    sent: int = 0
    received: int = 0
    unpaced_ns: int = 0

    def add_paced(self, heard: Sequence[Heard]) -> None:
        for one in heard:
            self.latencies_ns.extend(one.latencies_ns)

    def add_unpaced(self, spoken: Spoken, heard: Sequence[Heard]) -> None:
        self.sent += spoken.sent
        # The reader that got least counts, and the one that was done last.
        self.received += min(len(one.latencies_ns) for one in heard)
        self.unpaced_ns += max(max(one.last_ns for one in heard) - spoken.first_ns, 1)


def bench_broadcast(readers: Sequence[int], num_bytes: Sequence[int], pace: Pace) -> list[BenchRow]:
    """Measure every transport with every number of readers and every size.

    Args:
        readers: numbers of readers, each measured in processes of its own.
        num_bytes: sizes of a message.
        pace: how long, and with which pauses.

    Returns:
        A row for each number of readers, size and transport: p50 and p99 over all messages and readers;
        messages per second that reached every reader; how many were sent for that, and how many of them the
        reader that got least did not get; the ratio of its p50 to that of the ring.

    Raises:
        ConfigError: a size or number of readers makes no sense.
        TransportError: a process failed.
    """
    _check(readers, num_bytes)
    return [row for count in readers for row in _bench_readers(count, num_bytes, pace)]


def bench_idle(readers: Sequence[int], num_bytes: int, pace: Pace) -> list[BenchRow]:
    """Measure what readers cost that wait for long, and how fast they wake up.

    The silence and the waking take some times `pace.seconds`; the pauses are fixed and long.

    Returns:
        A row for each number of readers and transport: the mean and the largest CPU share of a reader over
        some seconds of silence, in per cent of a core; p50 and p99 of the one-way latency of messages that are
        tens of milliseconds apart; the ratio of its p50 to that of the ring.

    Raises:
        ConfigError: the size or a number of readers makes no sense.
        TransportError: a process failed.
    """
    _check(readers, [num_bytes])
    return [row for count in readers for row in _idle_readers(count, num_bytes, pace.seconds)]


def _check(readers: Sequence[int], num_bytes: Sequence[int]) -> None:
    if not 1 <= min(readers) <= max(readers) <= _MAX_READERS or min(num_bytes) < HEAD_BYTES:
        raise ConfigError(
            f"broadcast bench of {list(num_bytes)} bytes to {list(readers)} readers: expected {HEAD_BYTES}"
            f" bytes or more, and 1 to {_MAX_READERS} readers"
        )


@contextmanager
def _teams(readers: int, max_bytes: int) -> Iterator[list[Team]]:
    """Start a team of every transport; each has a folder of its own."""
    with bench_dir() as run_dir:
        teams = []
        for transport in TRANSPORTS:
            folder = Path(run_dir, transport)
            folder.mkdir()
            teams.append(Team(transport, str(folder), readers, max_bytes))
        with running(teams):
            yield teams


def _bench_readers(readers: int, num_bytes: Sequence[int], pace: Pace) -> list[BenchRow]:
    with _teams(readers, max(num_bytes)) as teams:
        return [row for size in num_bytes for row in _bench_size(teams, readers, size, pace)]


def _bench_size(teams: Sequence[Team], readers: int, size: int, pace: Pace) -> list[BenchRow]:
    tallies = {team.transport: _Tally() for team in teams}
    for team in teams:
        team.take_turn(size, _WARM_UP_MESSAGES, _WARM_UP_S, pace.gap_s)
    for _ in range(_PACED_TURNS):
        for team in teams:
            tallies[team.transport].add_paced(_send_paced(team, size, pace))
    for _ in range(_UNPACED_TURNS):
        for team in teams:
            tallies[team.transport].add_unpaced(*_send_unpaced(team, size, pace))
    ring_p50_us = _percentile_us(tallies[OURS].latencies_ns, 50)
    return [
        {
            "readers": readers,
            "num_bytes": size,
            "transport": name,
            "p50_us": _percentile_us(tally.latencies_ns, 50),
            "p99_us": _percentile_us(tally.latencies_ns, 99),
            "messages_per_s": round(tally.received * 1e9 / tally.unpaced_ns),
            "sent": tally.sent,
            "lost": tally.sent - tally.received,
            "p50_to_ring": round(_percentile_us(tally.latencies_ns, 50) / ring_p50_us, 2),
        }
        for name, tally in tallies.items()
    ]


def _send_paced(team: Team, size: int, pace: Pace) -> list[Heard]:
    turn_s = pace.seconds * _PACED_SHARE / _PACED_TURNS
    _, heard = team.take_turn(size, _PACED_MESSAGES, turn_s, pace.gap_s)
    return heard


def _send_unpaced(team: Team, size: int, pace: Pace) -> tuple[Spoken, list[Heard]]:
    messages = max(min(_UNPACED_MESSAGES, _UNPACED_BYTES // size), 1)
    turn_s = pace.seconds * (1 - _PACED_SHARE) / _UNPACED_TURNS
    return team.take_turn(size, messages, turn_s, None)


def _idle_readers(readers: int, num_bytes: int, seconds: float) -> list[BenchRow]:
    heard: dict[str, list[Heard]] = {}
    with _teams(readers, num_bytes) as teams:
        for team in teams:
            team.take_turn(num_bytes, _WARM_UP_MESSAGES, _WARM_UP_S, _WAKE_GAP_S / 10)
            _, heard[team.transport] = team.take_turn(
                num_bytes, _WAKE_MESSAGES, 2 * seconds, _WAKE_GAP_S, _SILENCE_FACTOR * seconds
            )
    latencies_ns = {name: [ns for one in all_ for ns in one.latencies_ns] for name, all_ in heard.items()}
    ring_p50_us = _percentile_us(latencies_ns[OURS], 50)
    return [
        {
            "readers": readers,
            "transport": name,
            **_cpu_shares(heard[name]),
            "wake_p50_us": _percentile_us(samples, 50),
            "wake_p99_us": _percentile_us(samples, 99),
            "p50_to_ring": round(_percentile_us(samples, 50) / ring_p50_us, 2),
        }
        for name, samples in latencies_ns.items()
    ]


def _cpu_shares(heard: Sequence[Heard]) -> dict[str, float]:
    shares = [100 * one.silent_cpu_s / one.silent_s for one in heard]
    return {
        "idle_cpu_percent": round(sum(shares) / len(shares), 3),
        "idle_cpu_percent_max": round(max(shares), 3),
    }


def _percentile_us(samples_ns: Sequence[int], percent: int) -> float:
    ordered = sorted(samples_ns)
    return round(ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] / 1000, 1)
