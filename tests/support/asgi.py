"""Calls an ASGI application by hand: for clients that leave early, or send in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from starlette.types import ASGIApp


class AsgiExchange:
    """One request and what has been answered so far."""

    def __init__(self, path: str, body_parts: Iterable[bytes], method: str = "POST") -> None:
        headers = [(b"content-type", b"application/json")]
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self._parts = list(body_parts)
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.num_read = 0
        self.left = asyncio.Event()
        self.on_body: Callable[[AsgiExchange], None] = lambda exchange: None

    async def run(self, app: ASGIApp) -> None:
        await asyncio.wait_for(app(self.scope, self._receive, self._send), 10.0)

    async def _receive(self) -> dict[str, Any]:
        if self._parts:
            part = self._parts.pop(0)
            self.num_read += len(part)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.on_body(self)
        await asyncio.sleep(0)
