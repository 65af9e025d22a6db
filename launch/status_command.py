"""`tprt status`: the running deployments of this user, as tables or as JSON."""

from __future__ import annotations

import json

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from launch.options import JsonOption
from launch.status import DeploymentStatus, Signs, find_deployments
from tprt.transport.heartbeat import AFTER_LAYERS, BEFORE_LAYERS, NO_STEP, Phase, RankBeat

EXIT_NOT_SERVING = 1
EXIT_NONE_FOUND = 3
NONE_FOUND = "no deployment of this user is running on this host"

_HEADINGS = ("rank", "pid", "state", "phase", "step", "layer", "collective", "sign s ago", "loaded MiB")
_MIB = 2**20


def status(as_json: JsonOption = False) -> None:
    """Show the running deployments of this user on this host, and whether they make progress.

    healthy: steps are finished as they come, or nothing is to be done. busy: the same, and requests wait.
    starting: the ranks are not ready. stalled: there is work and no progress, or a process is stopped or gone.
    degraded: of several replicas some serve.

    Exit code: 0 when all are healthy, busy or degraded, 1 when one is not, 3 when there is none.
    """
    found = find_deployments()
    for deployment in found:
        if as_json:
            print(json.dumps(_to_json(deployment)))
        else:
            _print(deployment)
    if not found:
        if not as_json:
            print(NONE_FOUND)
        raise typer.Exit(EXIT_NONE_FOUND)
    if not all(deployment.verdict.serves for deployment in found):
        raise typer.Exit(EXIT_NOT_SERVING)


def _age_s(signs: Signs, time_ns: int) -> float | None:
    return round((signs.now_ns - time_ns) / 1e9, 3) if time_ns else None


def _to_json(deployment: DeploymentStatus) -> dict[str, object]:
    signs = deployment.signs
    fields: dict[str, object] = {
        "run_dir": str(deployment.run_dir),
        "model": deployment.model,
        "verdict": deployment.verdict.value,
        "reason": deployment.reason,
        "server": _server_fields(signs),
    }
    if not deployment.replicas:
        return fields | _group_fields(signs)
    replicas = [
        {"replica": number, "verdict": one.verdict.value, "reason": one.reason} | _group_fields(one.signs)
        for number, one in enumerate(deployment.replicas)
    ]
    return fields | {"replicas": replicas}


def _group_fields(signs: Signs) -> dict[str, object]:
    beats = zip(signs.beats, signs.states, strict=True)
    return {
        "coordinator": _coordinator_fields(signs),
        "ranks": [_rank_fields(signs, beat, state) for beat, state in beats],
    }


def _server_fields(signs: Signs) -> dict[str, object] | None:
    if signs.server is None:
        return None
    return {"url": signs.server.url, "pid": signs.server.pid, "state": signs.server_state}


def _coordinator_fields(signs: Signs) -> dict[str, object] | None:
    record = signs.record
    if record is None:
        return None
    return {
        "pid": record.pid,
        "state": signs.coordinator_state,
        "epoch": record.epoch,
        "restarts": record.restarts,
        "step": None if record.step == NO_STEP else record.step,
        "step_age_s": _age_s(signs, record.step_ns) if record.step != NO_STEP else None,
        "num_running": record.num_running,
        "num_waiting": record.num_waiting,
        "oldest_waiting_s": _age_s(signs, record.oldest_waiting_ns),
    }


def _rank_fields(signs: Signs, beat: RankBeat, state: str) -> dict[str, object]:
    collective = {"number": beat.collective, "kind": beat.kind, "inside": beat.inside}
    return {
        "rank": beat.rank,
        "pid": beat.pid or None,
        "state": state,
        "epoch": beat.epoch,
        "phase": beat.phase.words,
        "step": None if beat.step == NO_STEP else beat.step,
        "layer": beat.layer if beat.layer >= 0 else None,
        "collective": collective if beat.collective else None,
        "age_s": _age_s(signs, beat.time_ns),
        "done_bytes": beat.done_bytes,
        "total_bytes": beat.total_bytes,
    }


def _print(deployment: DeploymentStatus) -> None:
    print(f"{deployment.run_dir}: {deployment.model}: {deployment.verdict} ({deployment.reason})")
    if (server := deployment.signs.server) is not None:
        print(f"  {server.url}; server pid {server.pid}")
    if not deployment.replicas:
        _print_group(deployment.signs)
    for number, replica in enumerate(deployment.replicas):
        print(f"  replica {number}: {replica.verdict} ({replica.reason})")
        _print_group(replica.signs)


def _print_group(signs: Signs) -> None:
    print(f"  {_coordinator_line(signs)}")
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in _HEADINGS:
        table.add_column(name, justify="right")
    for beat, state in zip(signs.beats, signs.states, strict=True):
        table.add_row(*_cells(signs, beat, state))
    if signs.beats:
        Console().print(table)


def _coordinator_line(signs: Signs) -> str:
    record = signs.record
    if record is None:
        return "the coordinator has left no record"
    parts = [f"coordinator pid {record.pid}", f"epoch {record.epoch}", f"{record.restarts} restarts"]
    if record.step != NO_STEP:
        parts.append(f"step {record.step} finished {_age_s(signs, record.step_ns)} s ago")
    parts.append(f"{record.num_running} running, {record.num_waiting} waiting")
    if record.oldest_waiting_ns:
        parts.append(f"the oldest for {_age_s(signs, record.oldest_waiting_ns)} s")
    return "; ".join(parts)


def _cells(signs: Signs, beat: RankBeat, state: str) -> list[str]:
    age_s = _age_s(signs, beat.time_ns)
    in_step = beat.phase in (Phase.PREFILL, Phase.DECODE)
    layer = {BEFORE_LAYERS: "before", AFTER_LAYERS: "after"}.get(beat.layer, str(beat.layer))
    collective = f"{'in ' if beat.inside else ''}{beat.kind} {beat.collective}"
    loaded = f"{beat.done_bytes / _MIB:,.0f}/{beat.total_bytes / _MIB:,.0f}"
    return [
        str(beat.rank),
        str(beat.pid or "-"),
        state or "-",
        beat.phase.words,
        "-" if beat.step == NO_STEP else str(beat.step),
        layer if in_step else "-",
        collective if beat.collective else "-",
        "-" if age_s is None else f"{age_s:.1f}",
        loaded if beat.total_bytes else "-",
    ]
