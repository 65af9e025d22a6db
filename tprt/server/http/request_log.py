"""One line for each finished request, its span where there are traces, and the id that ties it to its answer.

A line tells what was asked of the server and how that went, never what a prompt, an output or a key was. Knows
nothing of how a request is served.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tprt.log import get_logger
from tprt.messages import SamplingParams

_log = get_logger(__name__)
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_RECORD = "tprt.request"
_QUIET = frozenset({"/health", "/ready", "/metrics", "/version", "/state"})


@dataclass(slots=True)
class RequestRecord:
    """What log and trace will say of a request; whoever serves it fills it in.

    Attributes:
        request_id: also the header `x-request-id` of the answer.
        started_s: when it came, on the monotonic clock.
        status: of the answer; 499 when the client left before.
        first_token_s: from the beginning to the first token; None without one.
        queue_s: how long its first sequence waited in the engine before it ran; None if it did not.
        sampling: of its first choice; None where no token was asked for.
        num_choices: for each prompt.
    """

    request_id: str
    started_s: float = field(default_factory=time.monotonic)
    status: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    first_token_s: float | None = None
    finish_reason: str | None = None
    queue_s: float | None = None
    sampling: SamplingParams | None = None
    num_choices: int = 1

    def on_token(self) -> None:
        """Note the time of the first token."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.started_s


def record_of(scope: Scope) -> RequestRecord:
    """Return the record of the request that is being served."""
    record: RequestRecord = scope[_RECORD]
    return record


class RequestTracer(Protocol):
    """Who makes spans of requests."""

    def trace(self, endpoint: str, headers: Headers, record: RequestRecord) -> None:
        """Take note of a request that has ended."""

    def close(self, timeout_s: float) -> None:
        """Send what has not been sent, in `timeout_s` at most."""


class LogRequests:
    """Gives every request its id, and logs and traces it when it has ended."""

    def __init__(self, app: ASGIApp, enabled: bool, tracer: RequestTracer | None = None) -> None:
        """Assign only; `enabled`: write lines."""
        self._app = app
        self._enabled = enabled
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, and write its line whatever becomes of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = RequestRecord(request_id_of(headers))
        scope[_RECORD] = record
        id_header = (b"x-request-id", record.request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            endpoint = _endpoint(scope)
            if self._enabled:
                _write_line(scope["method"], endpoint, record)
            if self._tracer is not None:
                self._tracer.trace(endpoint, headers, record)


def request_id_of(headers: Headers) -> str:
    """Return the id that a request brings, or a new one."""
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _endpoint(scope: Scope) -> str:
    # What was asked for is not told where there is no such route: it may hold anything.
    path: str = getattr(scope.get("route"), "path", "(no such path)")
    return path


def _write_line(method: str, endpoint: str, record: RequestRecord) -> None:
    # Not ready yet is no news either: whoever waits for it asks every second.
    is_quiet = endpoint in _QUIET and (record.status < 400 or endpoint == "/ready")
    level = logging.DEBUG if is_quiet else logging.INFO
    if not _log.isEnabledFor(level):
        return
    fields = _fields(method, endpoint, record)
    text = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    _log.log(level, "request ended: %s", text, extra={"fields": fields})


def _fields(method: str, endpoint: str, record: RequestRecord) -> dict[str, object]:
    first = record.first_token_s
    return {
        "request_id": record.request_id,
        "method": method,
        "endpoint": endpoint,
        "status": record.status or 500,
        "prompt_tokens": record.num_prompt_tokens,
        "output_tokens": record.num_output_tokens,
        "duration_s": round(time.monotonic() - record.started_s, 4),
        "first_token_s": None if first is None else round(first, 4),
        "finish_reason": record.finish_reason,
    }
