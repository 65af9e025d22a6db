"""Answers that are a stream of server-sent events, at a few microseconds an event.

The work pushes finished events (bytes) into the connection. As long as it has pushed none, it can still fail
with a status of its own. Knows nothing of what is in an event.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tprt.server.http.disconnect import cancel_all, disconnected
from tprt.server.http.errors import CLIENT_GONE_STATUS, INTERNAL_STATUS, as_api_error
from tprt.server.http.request_log import record_of

Emit = Callable[[bytes], Awaitable[None]]
Produce = Callable[[Emit], Coroutine[Any, Any, None]]

DONE = b"data: [DONE]\n\n"
# A request that is refused is refused within milliseconds; one that waits longer has its headers by then.
_HEADERS_AFTER_S = 1.0
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # asks nginx not to hold events back
    (b"x-accel-buffering", b"no"),
]


def event(payload: Mapping[str, object]) -> bytes:
    """Return an event that carries a JSON object."""
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Runs `produce`, sends what it emits, and cancels it when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, produce: Produce) -> None:
        super().__init__()
        self._produce = produce
        self._started = False
        self._starting = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream to its end.

        Raises:
            ApiError, TprtError: the work failed before its first event; the framework answers with the status.
            Exception: there is a bug in the work; a stream that has begun was told of an internal error.
        """
        task = asyncio.ensure_future(self._work(send))
        watcher = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({task, watcher}, timeout=_HEADERS_AFTER_S, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and not watcher.done():
                await self._start(send)
                await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                record_of(scope).status = CLIENT_GONE_STATUS
            elif (error := task.exception()) is not None:
                await self._fail(error, send)
        finally:
            await cancel_all(task, watcher)

    async def _work(self, send: Send) -> None:
        async def emit(events: bytes) -> None:
            if not self._started:
                await self._start(send)
            await send({"type": "http.response.body", "body": events, "more_body": True})

        await self._produce(emit)
        if not self._started:
            await self._start(send)
        await send({"type": "http.response.body", "body": DONE})

    async def _start(self, send: Send) -> None:
        async with self._starting:
            if not self._started:
                await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
                self._started = True

    async def _fail(self, error: BaseException, send: Send) -> None:
        """End with an error's own status where nothing has been sent, and else with an event that tells it."""
        if not self._started:
            raise error
        failure = as_api_error(error)
        await send({"type": "http.response.body", "body": event(failure.body())})
        if failure.status_code == INTERNAL_STATUS:
            # for the server's log
            raise error
