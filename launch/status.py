"""Finds the deployments of this user on this host, and tells from their heartbeats whether they make progress.

Asks no process anything, so a stuck one cannot hold it up. Knows nothing of how the result is shown.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from launch.run_dir import find_config, living_run_dirs, newest_heartbeats, replica_dirs
from launch.serving.record import ServerRecord, read_server
from tprt.config import Config, SupervisionConfig
from tprt.coordinator.stall import is_stalled
from tprt.errors import TransportError
from tprt.transport.coordinator_beat import CoordinatorRecord, read_coordinator
from tprt.transport.heartbeat import HeartbeatReader, Phase, RankBeat
from tprt.transport.peer_process import is_gone, is_stopped, process_state, state_words

# What looks like a stall may be the instant between a request and its step: it is looked at again.
_LOOK_AGAIN_S = 0.2


class Verdict(StrEnum):
    """How a deployment is doing."""

    HEALTHY = "healthy"
    """Steps are finished as they come, or there is nothing to do."""
    STARTING = "starting"
    """The ranks are not ready."""
    BUSY = "busy"
    """Steps are finished, and requests wait for a place."""
    STALLED = "stalled"
    """There is work and no progress, or a process that cannot make any."""
    DEGRADED = "degraded"
    """Some replicas serve, and others do not."""
    LOST = "lost"
    """Of a replica: its ranks have failed and are not replaced."""

    @property
    def serves(self) -> bool:
        """Whether a request that comes now will be served."""
        return self in (Verdict.HEALTHY, Verdict.BUSY, Verdict.DEGRADED)


@dataclass(frozen=True, slots=True)
class Signs:
    """What the heartbeats of a deployment say at one moment.

    Attributes:
        now_ns: that moment, in monotonic nanoseconds.
        beats: the record of each rank; none before there are heartbeats.
        states: the state letter of each rank's process.
        record: what the coordinator has written, if it has.
        coordinator_state: the state letter of its process; "" without a record.
        server: where the HTTP server listens, if there is one.
        server_state: the state letter of its process; "" without a server.
    """

    now_ns: int
    beats: Sequence[RankBeat] = ()
    states: Sequence[str] = ()
    record: CoordinatorRecord | None = None
    coordinator_state: str = ""
    server: ServerRecord | None = None
    server_state: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One of several replicas: what is known of it, how it is doing and why that is said."""

    signs: Signs
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """One deployment: where it is, what it runs, how it is doing and why that is said.

    With several replicas `signs` are those of what they share, the server.
    """

    run_dir: Path
    model: str
    signs: Signs
    verdict: Verdict
    reason: str
    replicas: tuple[ReplicaStatus, ...] = ()


def find_deployments() -> list[DeploymentStatus]:
    """Return the deployments of this user that have not ended."""
    found = (look_at(run_dir) for run_dir in living_run_dirs())
    return [status for status in found if status is not None]


def look_at(run_dir: Path) -> DeploymentStatus | None:
    """Return how the deployment of `run_dir` is doing, or None when it has ended meanwhile."""
    config = find_config(run_dir)
    model = "unknown" if config is None else config.model.path
    timeout_s = (SupervisionConfig() if config is None else config.supervision).stall_timeout_s
    server = read_server(run_dir)
    folders = replica_dirs(run_dir, 1 if config is None else config.parallel.data_parallel_size)
    found = [_look_at_replica(folder, config, server, timeout_s) for folder in folders]
    if not run_dir.is_dir():
        return None
    if len(found) == 1:
        (only,) = found
        return DeploymentStatus(run_dir, model, only.signs, only.verdict, only.reason)
    verdict, reason = judge_replicas(found)
    return DeploymentStatus(run_dir, model, _signs_of(server), verdict, reason, tuple(found))


def _look_at_replica(
    folder: Path, config: Config | None, server: ServerRecord | None, timeout_s: float
) -> ReplicaStatus:
    if not folder.is_dir():
        return ReplicaStatus(_signs_of(server), Verdict.LOST, "its ranks have failed and are not replaced")
    try:
        signs = _read_signs(folder, config, server)
        verdict, reason = judge(signs, timeout_s)
        if verdict is Verdict.STALLED:
            time.sleep(_LOOK_AGAIN_S)
            signs = _read_signs(folder, config, server)
            verdict, reason = judge(signs, timeout_s)
    except TransportError as error:
        signs, verdict, reason = Signs(time.monotonic_ns()), Verdict.STALLED, str(error)
    return ReplicaStatus(signs, verdict, reason)


def judge_replicas(found: Sequence[ReplicaStatus]) -> tuple[Verdict, str]:
    """Tell how a deployment of several replicas is doing, and why."""
    bad = [(number, one) for number, one in enumerate(found) if not one.verdict.serves]
    if not bad:
        busy = next((one for one in found if one.verdict is Verdict.BUSY), found[0])
        return busy.verdict, busy.reason
    said = "; ".join(f"replica {number}: {one.verdict}, {one.reason}" for number, one in bad)
    if len(bad) < len(found):
        return Verdict.DEGRADED, f"{len(found) - len(bad)} of {len(found)} replicas serve; {said}"
    is_starting = any(one.verdict is Verdict.STARTING for _, one in bad)
    return Verdict.STARTING if is_starting else Verdict.STALLED, said


def judge(signs: Signs, stall_timeout_s: float) -> tuple[Verdict, str]:
    """Tell how a deployment is doing, and why.

    Progress is a step that was finished, or a layer: a long prefill is no stall.

    Args:
        signs: what is known.
        stall_timeout_s: work without progress for longer than this is a stall.
    """
    if broken := _broken_processes(signs):
        return Verdict.STALLED, broken
    if not signs.beats or not _is_ready(signs):
        return Verdict.STARTING, "the ranks are not ready"
    if signs.server is not None and not signs.server.is_ready:
        return Verdict.STARTING, "the server is not ready"
    record = signs.record
    if not _has_work(signs):
        return Verdict.HEALTHY, "nothing to do"
    if is_stalled(signs.beats, signs.now_ns, stall_timeout_s, _last_step_or_request_ns(record)):
        return Verdict.STALLED, f"there is work, and no progress for more than {stall_timeout_s:g} s"
    if record is not None and record.num_waiting:
        return Verdict.BUSY, "requests wait for a place"
    return Verdict.HEALTHY, "steps are finished as they come"


def _signs_of(server: ServerRecord | None) -> Signs:
    """Return what is known where there is nothing but the server."""
    state = "" if server is None else process_state(server.pid)
    return Signs(time.monotonic_ns(), server=server, server_state=state)


def _read_signs(run_dir: Path, config: Config | None, server: ServerRecord | None) -> Signs:
    path = newest_heartbeats(run_dir)
    if path is None:
        return _signs_of(server)
    reader = HeartbeatReader.open(path)
    beats = reader.read()
    reader.close()
    if config is not None and config.hosts.node_rank > 0:
        # Only node rank 0 hears of the ranks of other hosts.
        ranks = config.ranks_of(config.hosts.node_rank)
        beats = [beat for beat in beats if beat.rank in ranks]
    record = read_coordinator(path)
    return Signs(
        now_ns=time.monotonic_ns(),
        beats=beats,
        states=[beat.state for beat in beats],
        record=record,
        coordinator_state="" if record is None else process_state(record.pid),
        server=server,
        server_state="" if server is None else process_state(server.pid),
    )


def _broken_processes(signs: Signs) -> str:
    """Name the processes that cannot make progress; "" when all can."""
    known = [
        (f"rank {beat.rank}", beat.pid, state)
        for beat, state in zip(signs.beats, signs.states, strict=True)
        if beat.pid
    ]
    if signs.record is not None:
        known.insert(0, ("coordinator", signs.record.pid, signs.coordinator_state))
    if signs.server is not None:
        known.append(("server", signs.server.pid, signs.server_state))
    return ", ".join(
        f"{name} (pid {pid}) {state_words(state)}"
        for name, pid, state in known
        if is_gone(state) or is_stopped(state)
    )


def _is_ready(signs: Signs) -> bool:
    if signs.record is not None:
        return signs.record.serves
    return all(beat.phase >= Phase.IDLE for beat in signs.beats)


def _has_work(signs: Signs) -> bool:
    if signs.record is not None:
        return signs.record.num_running + signs.record.num_waiting > 0
    return any(beat.phase in (Phase.PREFILL, Phase.DECODE) for beat in signs.beats)


def _last_step_or_request_ns(record: CoordinatorRecord | None) -> int:
    """Return since when progress may be asked for, as the coordinator sees it."""
    if record is None:
        return 0
    # A request that came when there was nothing to do waits since it came, not since the last step.
    return max(record.step_ns, 0 if record.num_running else record.oldest_waiting_ns)
