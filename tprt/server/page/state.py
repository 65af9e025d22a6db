"""What the live page shows, as JSON: the engine, the ranks, the requests, and sums to draw charts from.

Sums grow for ever; whoever asks twice knows the rate between. Holds no prompt, no output and no key. Knows
nothing of how it is drawn.
"""

from __future__ import annotations

import dataclasses
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tprt.messages import EngineStats
from tprt.server.histogram import Histogram
from tprt.server.http.context import ServerContext
from tprt.server.metrics_history import Moment
from tprt.server.rank_views import RankView, look_at_ranks
from tprt.server.request_metrics import RequestTotals
from tprt.transport.heartbeat import NO_STEP
from tprt.transport.peer_process import state_words

MAX_REQUESTS = 100
"""Most running requests that are listed, the oldest of them."""
_ID_CHARS = 12
_NVIDIA = Path("/dev/nvidiactl")


def read_state(context: ServerContext, with_history: bool = False) -> dict[str, object]:
    """Return everything as plain values; times are seconds, sizes bytes.

    Args:
        context: the server.
        with_history: also return the sums of the last minutes.
    """
    is_well, reason = context.engine.is_healthy()
    return {
        "time_s": context.metrics.clock(),
        "model": context.model_name,
        "version": _version(),
        "uptime_s": max(0.0, time.time() - context.created_s),
        "is_ready": context.engine.ready is not None,
        "is_well": is_well,
        "reason": reason,
        "engine": _engine(context.engine.stats),
        "ranks": _ranks(context),
        "totals": _totals(context.metrics.totals),
        "requests": _requests(context),
        "num_requests": context.engine.num_running,
        "history": [_moment(moment) for moment in context.metrics.history.moments] if with_history else [],
    }


def _version() -> str:
    try:
        return version("tprt")
    except PackageNotFoundError:
        return "unknown"


def _engine(stats: EngineStats | None) -> dict[str, object] | None:
    if stats is None:
        return None
    fields = dataclasses.asdict(stats)
    del fields["queue_counts"], fields["queue_sum_s"]
    return fields


def _ranks(context: ServerContext) -> list[dict[str, object]]:
    """Return the ranks of all replicas; with several, a rank is named by its replica's number and its own."""
    world_size, device = context.config.parallel.tensor_parallel_size, context.config.runtime.device
    ranks = []
    for replica, heartbeats in enumerate(context.heartbeats):
        for view in look_at_ranks(heartbeats):
            rank = view.beat.rank
            name = rank if len(context.heartbeats) == 1 else f"{replica}.{rank}"
            place = _device(device, replica * world_size + rank)
            ranks.append({"rank": name, "device": place} | _rank(view))
    return ranks


def _rank(view: RankView) -> dict[str, object]:
    beat = view.beat
    return {
        "pid": beat.pid or None,
        "process": state_words(view.state) if beat.pid else "has not started",
        "phase": beat.phase.words,
        "step": None if beat.step == NO_STEP else beat.step,
        "step_lag": view.step_lag,
        "layer": beat.layer if beat.layer >= 0 else None,
        "collective": f"{beat.kind} {beat.collective}" if beat.inside else None,
        "heartbeat_age_s": view.age_s,
        "resident_bytes": view.resident_bytes,
        "loaded_bytes": beat.done_bytes,
        "total_bytes": beat.total_bytes,
    }


def _device(setting: str, rank: int) -> str:
    """Return the device of a rank: `auto` takes CUDA devices where there is a driver for them."""
    is_cuda = setting == "cuda" or (setting == "auto" and _NVIDIA.exists())
    return f"cuda:{rank}" if is_cuda else "cpu"


def _totals(totals: RequestTotals) -> dict[str, object]:
    return {
        "prompt_tokens": totals.num_prompt_tokens,
        "generated_tokens": totals.num_generated_tokens,
        "ended": dict(totals.ended),
        "first_token": _histogram(totals.first_token_s),
        "between_tokens": _histogram(totals.between_tokens_s),
    }


def _histogram(histogram: Histogram) -> dict[str, object]:
    return {"bounds_s": histogram.bounds, "counts": histogram.counts, "sum_s": histogram.sum}


def _moment(moment: Moment) -> dict[str, object]:
    """Return a moment with the names that the whole state has; the bounds are the same for all."""
    return {
        "time_s": moment.time_s,
        "engine": _engine(moment.stats),
        "totals": {
            "prompt_tokens": moment.num_prompt_tokens,
            "generated_tokens": moment.num_generated_tokens,
            "first_token": {"counts": moment.first_token_counts},
            "between_tokens": {"counts": moment.between_tokens_counts},
        },
    }


def _requests(context: ServerContext) -> list[dict[str, object]]:
    now_s = time.monotonic()
    oldest_first = sorted(context.engine.running(), key=lambda request: request[2])
    return [
        {
            "id": name[:_ID_CHARS],
            "age_s": now_s - started_s,
            "num_prompt_tokens": len(completion.prompt_token_ids),
            "num_tokens": len(completion.token_ids),
            "max_tokens": completion.sampling.max_tokens,
        }
        for name, completion, started_s in oldest_first[:MAX_REQUESTS]
    ]
