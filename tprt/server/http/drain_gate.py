"""Lets requests in until the server is about to end; what is inside then can finish.

Knows nothing of what a request asks for and of why the server ends.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tprt.server.http.errors import ApiError
from tprt.server.http.request_log import request_id_of

# What people and machines look at meanwhile.
_ALWAYS_OPEN = frozenset({"/health", "/metrics", "/version", "/state", "/"})
_RETRY_S = "5"


class DrainGate:
    """Counts the requests inside; once closed, others get status 503 and a closed connection."""

    def __init__(self, app: ASGIApp) -> None:
        self.num_inside = 0
        self._app = app
        self._is_closed = False
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def close(self) -> None:
        """Let nobody in any more."""
        self._is_closed = True

    async def wait_until_empty(self, timeout_s: float) -> bool:
        """Wait until everybody has left, `timeout_s` at most; return whether they have."""
        try:
            await asyncio.wait_for(self._is_empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, or refuse it."""
        if scope["type"] != "http" or scope["path"] in _ALWAYS_OPEN:
            await self._app(scope, receive, send)
        elif self._is_closed:
            headers = {"Retry-After": _RETRY_S, "Connection": "close"}
            # Those inside get theirs from the log, which is behind the gate.
            headers["x-request-id"] = request_id_of(Headers(scope=scope))
            refusal = ApiError(503, "the server is about to end", code="shutting_down", headers=headers)
            await refusal.response()(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_inside += 1
        self._is_empty.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self.num_inside -= 1
            if not self.num_inside:
                self._is_empty.set()
