"""The application: all routes, and what every request passes on its way to them.

Pure ASGI middleware only: the framework's base class for middleware costs a task and a queue for each chunk
of a stream. Knows nothing of sockets and processes.
"""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from tprt.errors import TprtError
from tprt.log import get_logger
from tprt.server.http.auth import RequireKey
from tprt.server.http.body_limit import LimitBody
from tprt.server.http.context import ServerContext
from tprt.server.http.errors import INTERNAL_STATUS, ApiError, as_api_error, routing_error, validation_error
from tprt.server.http.probes import make_probe_router
from tprt.server.http.request_log import LogRequests, record_of
from tprt.server.openai.router import make_openai_router
from tprt.server.page.router import make_page_router

_log = get_logger(__name__)


def make_app(context: ServerContext) -> FastAPI:
    """Return the application that serves `context`."""
    app = FastAPI(
        title="tprt",
        version=version("tprt"),
        description="An OpenAI-compatible server of one model.",
        # These pages load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middleware(context),
    )
    app.include_router(make_openai_router(context))
    app.include_router(make_probe_router(context))
    app.include_router(make_page_router(context))
    _handle_errors(app)
    return app


def _middleware(context: ServerContext) -> list[Middleware]:
    server = context.config.server
    stack = [Middleware(LogRequests, enabled=server.log_requests, tracer=context.tracer)]
    if server.allowed_origins:
        # Before the key is asked for: browsers ask for permission without one.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(server.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        stack.append(cors)
    if context.api_keys:
        stack.append(Middleware(RequireKey, keys=context.api_keys))
    return [*stack, Middleware(LimitBody, max_bytes=server.max_body_bytes)]


def _handle_errors(app: FastAPI) -> None:
    async def on_api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_tprt_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, TprtError)
        failure = as_api_error(error)
        if failure.status_code == INTERNAL_STATUS:
            _log.error("a request has failed: %s", error)
        return failure.response()

    async def on_invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation_error(error.errors()).response()

    async def on_routing_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return routing_error(request, error).response()

    async def on_bug(request: Request, error: Exception) -> Response:
        # The framework raises the error again for the server's log, which is where its traceback belongs.
        response = as_api_error(error).response()
        response.headers["x-request-id"] = record_of(request.scope).request_id
        return response

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(TprtError, on_tprt_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_routing_error)
    app.add_exception_handler(Exception, on_bug)
