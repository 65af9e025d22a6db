"""A small HTTP/1.1 client for streams: connections that are kept, and bodies handed on as they arrive.

A token costs it one callback and no task switch, so that one core drives servers that make tens of thousands of
tokens per second, and a time that is taken in the callback is the time of arrival. Knows nothing of what a body
means.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from launch.bench.serve_parser import BadResponseError, ResponseParser
from tprt.errors import ConfigError

# Of an answer that is not a stream: an error, a list of models.
_MAX_BODY_BYTES = 16 * 1024 * 1024
OnBody = Callable[[bytes], None]


class HttpError(Exception):
    """A request got no whole answer.

    Attributes:
        kind: a few words that errors of the same sort share.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Response:
    """Of an answer; `body` is empty if it was handed on, `retry_after_s` is when a busy server is free."""

    status: int
    body: bytes
    retry_after_s: int | None = None


class HttpClient:
    """Requests to one server; each has a connection to itself, which the next one then takes over."""

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        """Connect to nothing yet.

        Args:
            base_url: such as `http://127.0.0.1:8000`; an OpenAI client's, with `/v1` at its end, is as good.
            headers: sent with every request.

        Raises:
            ConfigError: this is no URL of a server.
        """
        self._host, self._port, self._tls, self._prefix = _split_url(base_url)
        host = f"[{self._host}]" if ":" in self._host else self._host
        lines = {"Host": f"{host}:{self._port}", "Accept-Encoding": "identity", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> Response:
        """Return the answer to GET `path`; raises as `post` does."""
        return await self._exchange(f"GET {self._prefix}{path} HTTP/1.1\r\n{self._head}\r\n".encode(), None)

    async def post(self, path: str, body: bytes, on_body: OnBody | None = None) -> Response:
        """Post JSON to `path` and return the answer.

        Args:
            path: of the resource, from `/v1` or the like on.
            body: the JSON.
            on_body: called with each part of the body of an answer with status 200, as it arrives.

        Raises:
            HttpError: there is no connection, or no whole answer comes. Cancelling closes the connection.
        """
        length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}{length}\r\n"
        return await self._exchange(head.encode() + body, on_body)

    def close(self) -> None:
        """Close the connections that wait for a next request."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, request: bytes, on_body: OnBody | None) -> Response:
        while (connection := self._take_idle()) is not None:
            # A server may have closed a connection that waited: then nothing has come, and a new one serves.
            with contextlib.suppress(_StaleConnectionError):
                return await self._on(connection, request, on_body, True)
        return await self._on(await self._connect(), request, on_body, False)

    async def _on(
        self, connection: _Connection, request: bytes, on_body: OnBody | None, is_reused: bool
    ) -> Response:
        try:
            response = await connection.exchange(request, on_body, is_reused)
        except BaseException:
            connection.close()
            raise
        if connection.is_reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return response

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        context = ssl.create_default_context() if self._tls else None
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=context)
        except ssl.SSLError as error:
            raise HttpError("no TLS", f"{self._host}:{self._port}: {error}") from error
        except OSError as error:
            raise HttpError("cannot connect", f"{self._host}:{self._port}: {error}") from error
        return connection


def _split_url(base_url: str) -> tuple[str, int, bool, str]:
    """Return host, port, whether it is TLS, and what every path begins with."""
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--base-url {base_url}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--base-url {base_url}: expected http:// or https://, a host and perhaps a port")
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return parts.hostname, port or (443 if tls else 80), tls, prefix


class _StaleConnectionError(Exception):
    """A kept connection was closed by the server before it had answered anything."""


class _Connection(asyncio.Protocol):
    """One connection; one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._is_open = False
        self._parser = ResponseParser()
        self._done: asyncio.Future[None] | None = None
        self._on_body: OnBody | None = None
        self._body = bytearray()
        self._has_answered = False

    @property
    def is_reusable(self) -> bool:
        """Whether the server is there and expects another request."""
        return self._is_open and self._parser.keeps_alive

    async def exchange(self, request: bytes, on_body: OnBody | None, is_reused: bool) -> Response:
        """Send `request`, and wait until the answer has come whole."""
        assert self._transport is not None
        self._parser = ResponseParser()
        self._body.clear()
        self._on_body, self._has_answered = on_body, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        except HttpError as error:
            if is_reused and not self._has_answered:
                raise _StaleConnectionError from error
            raise
        finally:
            self._done = None
        return Response(self._parser.status, bytes(self._body), self._parser.retry_after_s)

    def close(self) -> None:
        """Let go of the connection; an answer that has not come whole is given up."""
        self._is_open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._is_open = transport, True

    def data_received(self, data: bytes) -> None:
        if self._done is None:
            # Nobody has asked for anything: a server that says good-bye.
            self.close()
            return
        self._has_answered = True
        try:
            body = self._parser.feed(data)
        except BadResponseError as error:
            self._fail(HttpError("bad response", str(error)))
            return
        if body:
            self._take(body)
        if self._parser.is_done:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_open = False
        if self._parser.ends_with_connection:
            self._finish()
        else:
            self._fail(HttpError("connection lost", f"the server has closed the connection ({exc or 'end'})"))

    def _take(self, body: bytes) -> None:
        if self._on_body is not None and self._parser.status == 200:
            self._on_body(body)
            return
        self._body += body
        if len(self._body) > _MAX_BODY_BYTES:
            self._fail(HttpError("bad response", f"an answer of more than {_MAX_BODY_BYTES} bytes"))

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: HttpError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        elif self._transport is not None:
            self._transport.abort()
