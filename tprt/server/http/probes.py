"""What is asked of a server rather than of its model: does it live, is it ready, how does it do, what is it.

Knows nothing of how that is found out.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from tprt.server.http.context import ServerContext
from tprt.server.http.errors import not_ready, without_paths

_UNWELL: dict[int | str, dict[str, Any]] = {503: {"description": "no; the body says why"}}


def make_probe_router(context: ServerContext) -> APIRouter:
    """Return `/health`, `/ready`, `/metrics` and `/version`."""
    router = APIRouter()

    @router.get("/health", responses=_UNWELL)
    async def health() -> Response:
        """Tell whether the engine makes progress (not only whether its processes exist)."""
        is_healthy, reason = context.engine.is_healthy()
        return JSONResponse(_health(context, is_healthy, reason), 200 if is_healthy else 503)

    @router.get("/ready", responses=_UNWELL)
    async def ready() -> Response:
        """Tell whether requests are served."""
        is_healthy, reason = context.engine.is_healthy()
        if context.engine.ready is None or not is_healthy:
            raise not_ready(without_paths(reason))
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(context.metrics.render(), media_type=context.metrics.content_type)

    @router.get("/version")
    async def show_version() -> Response:
        """Return the version of the server."""
        return JSONResponse({"version": version("tprt")})

    return router


def _health(context: ServerContext, is_healthy: bool, reason: str) -> dict[str, object]:
    health: dict[str, object] = {
        "status": "ok" if is_healthy else "unhealthy",
        "reason": without_paths(reason),
        "is_ready": context.engine.ready is not None,
        "num_requests": context.engine.num_running,
    }
    stats = context.engine.stats
    if stats is not None:
        health |= {
            "epoch": stats.epoch,
            "num_steps": stats.num_steps,
            "last_step_s": round(stats.last_step_s, 3),
        }
    if context.config.parallel.data_parallel_size > 1:
        health["replicas"] = [
            {"state": one.state.value, "is_well": one.is_well, "reason": without_paths(one.reason)}
            for one in context.engine.replicas()
        ]
    return health
