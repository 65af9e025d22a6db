"""Refuses bodies that are too large, while they are read.

A length that is announced is refused before anything is read; a body that comes in chunks is, once it has grown
too large. Knows nothing of what is in a body.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tprt.server.http.errors import ApiError


class LimitBody:
    """Lets through requests with bodies of at most `max_bytes`; answers 413 to others."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a `receive` that counts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        await self._app(scope, self._counting(receive), send)

    def _counting(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                # Goes up through the framework's reading of the body to its handler of HTTP errors.
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        message = f"the body is too large; this server takes at most {self._max_bytes} bytes"
        return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})
