"""One request of the load: what is sent, and when what of its answer came.

Knows nothing of connections, of other requests, and of what the times are used for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.bench.serve_http import HttpClient, HttpError
from launch.bench.serve_parser import EventParser

Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_SHOWN_CHARS = 500


@dataclass(slots=True)
class RequestResult:
    """What became of one request.

    Attributes:
        prompt_len: tokens of the prompt: what the server counts, or what was asked for where it does not say.
        start_s: when it was sent, by `time.perf_counter`.
        ttft_s: until its first token; 0 before that.
        itls_s: between one event with text and the next; several tokens may come in one.
        latency_s: until its last token.
        output_len: tokens of the output: what the server counts, or else the events with text.
        error_kind, error: why it failed; empty when it did not.
        is_done: it has ended, well or not.
    """

    prompt_len: int
    start_s: float = 0.0
    ttft_s: float = 0.0
    itls_s: list[float] = field(default_factory=list)
    latency_s: float = 0.0
    output_len: int = 0
    text: str = ""
    error_kind: str = ""
    error: str = ""
    is_done: bool = False

    @property
    def is_good(self) -> bool:
        """Whether it has ended without an error."""
        return self.is_done and not self.error_kind

    def fail(self, kind: str, error: str) -> None:
        """Note the first error."""
        if not self.error_kind:
            self.error_kind, self.error = kind, error[:_SHOWN_CHARS]


class StreamTimes:
    """Takes the events of one stream and notes in `result` when the tokens came."""

    def __init__(self, result: RequestResult, clock: Callable[[], float] = time.perf_counter) -> None:
        self._result = result
        self._clock = clock
        self._events = EventParser()
        self._newest_s = 0.0
        self._pieces: list[str] = []
        self._has_ended = False

    def feed(self, body: bytes) -> None:
        """Take a part of the body, which has arrived just now."""
        now_s = self._clock()
        for data in self._events.feed(body):
            if data == b"[DONE]":
                self._has_ended = True
            else:
                self._take(data, now_s)

    def finish(self) -> None:
        """Note what the stream came to, once the answer is whole."""
        result = self._result
        result.text = "".join(self._pieces)
        if not result.output_len:
            result.output_len = len(self._pieces)
        if not self._has_ended:
            result.fail("stream cut short", "the answer ended without the event [DONE]")
        elif not self._pieces:
            result.fail("no tokens", "the answer has no token")

    def _take(self, data: bytes, now_s: float) -> None:
        try:
            self._take_event(json.loads(data), now_s)
        except (ValueError, TypeError, AttributeError):
            self._result.fail("bad event", f"this is no event of a completion: {data[:200]!r}")

    def _take_event(self, event: dict[str, Any], now_s: float) -> None:
        if error := event.get("error"):
            self._result.fail("error in the stream", json.dumps(error))
        if usage := event.get("usage"):
            self._count(usage)
        for choice in event.get("choices") or ():
            self._take_choice(choice, now_s)

    def _count(self, usage: dict[str, int]) -> None:
        self._result.prompt_len = usage.get("prompt_tokens", self._result.prompt_len)
        self._result.output_len = usage.get("completion_tokens", 0)

    def _take_choice(self, choice: dict[str, Any], now_s: float) -> None:
        text = _text_of(choice)
        if text is None:
            return
        result = self._result
        if not self._pieces:
            result.ttft_s = now_s - result.start_s
        else:
            result.itls_s.append(now_s - self._newest_s)
        self._pieces.append(text)
        self._newest_s = now_s
        result.latency_s = now_s - result.start_s


def _text_of(choice: dict[str, Any]) -> str | None:
    """Return the text that a token or several brought; None for an event that brings no token.

    Text may be empty: a token may be half a character. The role at the beginning of a chat and the reason at
    the end of a stream often come alone.
    """
    delta = choice.get("delta")
    if delta is None:
        text = choice.get("text") or ""
    else:
        text = delta.get("content") or delta.get("reasoning_content") or ""
        if not text and (delta.get("role") and not delta.get("tool_calls")):
            return None
    return None if not text and choice.get("finish_reason") else text


async def stream_request(client: HttpClient, endpoint: Endpoint, body: bytes, result: RequestResult) -> None:
    """Send a request and note in `result` what comes; never raises for what the server does."""
    times = StreamTimes(result)
    result.start_s = time.perf_counter()
    try:
        response = await client.post(PATHS[endpoint], body, times.feed)
    except HttpError as error:
        result.fail(error.kind, str(error))
    else:
        if response.status == 200:
            times.finish()
        else:
            result.fail(f"HTTP {response.status}", response.body.decode(errors="replace"))
    result.is_done = True
