"""Clients of a soak: they read streams, whose text is compared, leave, dawdle, and send what is wrong.

Knows nothing of the processes behind the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from launch.bench.serve_http import HttpClient, HttpError, Response
from launch.bench.serve_parser import BadResponseError, ResponseParser
from launch.bench.serve_stream import PATHS, RequestResult, StreamTimes
from scripts.soak_bad_requests import BadRequest, bad_requests, cut, post
from scripts.soak_cases import Case
from scripts.soak_tally import Tally

_ANSWER_S = 300.0
_REFUSAL_S = 60.0
_MAX_PAUSE_S = 0.2
_MAX_BUSY_S = 1.0
_DAWDLE_S = 3.0
_HALF_S = 2.0
_BUSY = (429, 503)


@dataclass(frozen=True, slots=True)
class Target:
    """The server, its model, and what is sent."""

    base_url: str
    model: str
    cases: Sequence[Case]


class Client:
    """One client: does one thing after the other until the time is over."""

    def __init__(self, target: Target, tally: Tally, seed: int) -> None:
        self._target = target
        self._tally = tally
        self._draw = random.Random(seed)
        self._http = HttpClient(target.base_url, {})
        self._bad = bad_requests(target.model)

    async def run(self, until_s: float) -> None:
        """Begin nothing new after `until_s`, by `time.monotonic`, and bring what was begun to its end."""
        things: dict[Callable[[], Awaitable[None]], int] = {
            self._stream: 50,
            self._ask_for_all: 8,
            self._leave_early: 18,
            self._leave_at_once: 6,
            self._dawdle: 4,
            self._be_wrong: 12,
            self._send_half: 2,
        }
        try:
            await asyncio.sleep(self._draw.random())
            while time.monotonic() < until_s:
                (thing,) = self._draw.choices(list(things), list(things.values()))
                await thing()
                await asyncio.sleep(self._draw.uniform(0, _MAX_PAUSE_S))
        finally:
            self._http.close()

    def _case(self) -> Case:
        return self._draw.choice(self._target.cases)

    async def _stream(self) -> None:
        case, result = self._case(), RequestResult(0)
        times = StreamTimes(result)
        response = await self._post(case, True, times.feed)
        if response is not None:
            times.finish()
            if result.error_kind:
                self._tally.violate(result.error_kind, result.error)
            else:
                self._compare("streamed", case, result.text, result.output_len)

    async def _ask_for_all(self) -> None:
        case = self._case()
        response = await self._post(case, False)
        if response is not None:
            answer = json.loads(response.body)
            (choice,) = answer["choices"]
            text = choice["message"]["content"] if case.endpoint == "chat" else choice["text"]
            self._compare("whole", case, text, answer["usage"]["completion_tokens"])

    def _compare(self, how: str, case: Case, text: str, num_tokens: int) -> None:
        if (text, num_tokens) == (case.text, case.max_tokens):
            self._tally.count(f"{how}, equal to offline")
            self._tally.count("tokens compared", num_tokens)
        else:
            found = f"{case.prompt!r}: {case.max_tokens} tokens {case.text!r}, found {num_tokens} {text!r}"
            self._tally.violate(f"{how}, other than offline", found)

    async def _post(
        self, case: Case, stream: bool, on_body: Callable[[bytes], None] | None = None
    ) -> Response | None:
        """Return the answer with status 200; None, and noted, where there is none."""
        path, body = PATHS[case.endpoint], json.dumps(case.body(self._target.model, stream)).encode()
        try:
            async with asyncio.timeout(_ANSWER_S):
                response = await self._http.post(path, body, on_body)
        except HttpError as error:
            self._tally.violate(error.kind, str(error))
        except TimeoutError:
            self._tally.violate("no end", f"{case.prompt!r} has not ended after {_ANSWER_S} s")
        else:
            if response.status == 200:
                return response
            await self._take_refusal(response)
        return None

    async def _take_refusal(self, response: Response) -> None:
        said = response.body.decode(errors="replace")
        if response.status in _BUSY and response.retry_after_s is not None:
            self._tally.count(f"announced {response.status}")
            await asyncio.sleep(min(response.retry_after_s, _MAX_BUSY_S))
        else:
            self._tally.violate(f"HTTP {response.status} for a good request", said)

    async def _leave_early(self) -> None:
        """Leave after some events, or after some time if they do not come."""
        case, left = self._case(), asyncio.Event()
        num_parts = self._draw.randint(1, 6)

        def on_body(body: bytes) -> None:
            nonlocal num_parts
            num_parts -= 1
            if num_parts <= 0:
                left.set()

        answer = asyncio.ensure_future(self._post(case, True, on_body))
        leaving = asyncio.ensure_future(left.wait())
        patience_s = self._draw.uniform(0.5, 10)
        await asyncio.wait({answer, leaving}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        self._tally.count("left: ended before" if answer.done() else "left in mid-stream or queue")
        for task in (answer, leaving):
            task.cancel()
        await asyncio.wait({answer, leaving})

    async def _leave_at_once(self) -> None:
        """Leave before there can be a header."""
        _, writer = await self._connect()
        stream = self._draw.random() < 0.5
        case = self._case()
        writer.write(post(PATHS[case.endpoint], json.dumps(case.body(self._target.model, stream)).encode()))
        await asyncio.sleep(self._draw.choice((0.0, 0.001, 0.02)))
        writer.transport.abort()
        self._tally.count("left before the headers")

    async def _dawdle(self) -> None:
        """Read nothing for a while; then all of it must be there."""
        case, result = self._case(), RequestResult(0)
        reader, writer = await self._connect()
        body = json.dumps(case.body(self._target.model, True)).encode()
        writer.write(post(PATHS[case.endpoint], body))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(self._draw.uniform(0, _DAWDLE_S))
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        times = StreamTimes(result)
        status = await self._read_answer(reader, times.feed, _ANSWER_S)
        writer.transport.abort()
        if status in _BUSY:
            self._tally.count(f"announced {status}")
            return
        times.finish()
        if status == 200 and not result.error_kind:
            self._compare("read late", case, result.text, result.output_len)
        else:
            self._tally.violate("read late, not served", f"HTTP {status}, {result.error_kind} {result.error}")

    async def _be_wrong(self) -> None:
        """Send what must be refused."""
        request = self._draw.choice(self._bad)
        reader, writer = await self._connect()
        parts: list[bytes] = []
        try:
            writer.write(request.data)
            status = await self._read_answer(reader, parts.append, _REFUSAL_S)
        finally:
            writer.transport.abort()
        self._judge(request, status, b"".join(parts))

    def _judge(self, request: BadRequest, status: int | None, said: bytes) -> None:
        if request.refuses(status):
            self._tally.count(f"refused: {request.kind}")
        else:
            found = "no answer" if status is None else f"HTTP {status}"
            self._tally.violate(f"not refused: {request.kind}", f"{found} {said.decode(errors='replace')}")

    async def _send_half(self) -> None:
        """Begin a request, a byte now and then, and never end it."""
        case = self._case()
        body = json.dumps(case.body(self._target.model, True)).encode()
        half = cut(self._draw, post(PATHS[case.endpoint], body))
        _, writer = await self._connect()
        writer.write(half[:-3])
        for byte in half[-3:]:
            await asyncio.sleep(self._draw.uniform(0, _HALF_S))
            writer.write(bytes([byte]))
        writer.transport.abort()
        self._tally.count("sent half a request")

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self._target.base_url)
        return await asyncio.open_connection(parts.hostname, parts.port)

    async def _read_answer(
        self, reader: asyncio.StreamReader, on_body: Callable[[bytes], object], timeout_s: float
    ) -> int | None:
        """Return the status once the whole answer has been read; None where the connection ends before."""
        parser = ResponseParser()
        try:
            async with asyncio.timeout(timeout_s):
                while not parser.is_done and (data := await reader.read(65536)):
                    on_body(parser.feed(data))
        except ConnectionError:
            pass
        except TimeoutError:
            self._tally.violate("no answer in time", f"after {timeout_s} s")
        except BadResponseError as error:
            self._tally.violate("bad response", str(error))
        return parser.status or None
