"""An OpenAI-compatible server of few lines, which answers as it is told to. Knows nothing of models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Writer = asyncio.StreamWriter
Answer = Callable[["Request", Writer], Awaitable[None]]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class SseServer:
    """What came, and how many connections were made for it."""

    base_url: str = ""
    requests: list[Request] = field(default_factory=list)
    num_connections: int = 0
    num_open: int = 0
    most_at_once: int = 0


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[SseServer]:
    """Answer POSTs with `answer`, and models and /tokenize by itself."""
    server = SseServer()
    tasks: set[asyncio.Task[None]] = set()

    async def serve_connection(reader: asyncio.StreamReader, writer: Writer) -> None:
        server.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        try:
            while (request := await read_request(reader)) is not None:
                server.requests.append(request)
                server.num_open += 1
                server.most_at_once = max(server.most_at_once, server.num_open)
                try:
                    await (answer_by_itself(request) or answer)(request, writer)
                finally:
                    server.num_open -= 1
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    listener = await asyncio.start_server(serve_connection, "127.0.0.1", 0)
    async with listener:
        host, port = listener.sockets[0].getsockname()
        server.base_url = f"http://{host}:{port}"
        try:
            yield server
        finally:
            for task in tasks:
                task.cancel()


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, path, headers, json.loads(body or b"{}"))


def answer_by_itself(request: Request) -> Answer | None:
    if request.path == "/v1/models":
        return lambda request, writer: send_json(writer, 200, {"data": [{"id": "tiny"}, {"id": "other"}]})
    if request.path == "/tokenize":
        return lambda request, writer: send_json(writer, 200, {"tokens": [3, 198, 7], "count": 3})
    return None


async def send_json(writer: Writer, status: int, body: object) -> None:
    data = json.dumps(body).encode()
    writer.write(b"HTTP/1.1 %d Some\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))
    await writer.drain()


async def send_head(writer: Writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    await writer.drain()


async def send_event(writer: Writer, event: object) -> None:
    data = event if isinstance(event, str) else json.dumps(event)
    line = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(line), line))
    await writer.drain()
    # Each in a part of its own, as tokens come.
    await asyncio.sleep(0)


async def send_end(writer: Writer) -> None:
    await send_event(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def send_completion(request: Request, writer: Writer) -> None:
    """Answer as a server does that makes a token for each of `max_tokens`."""
    is_chat = "messages" in request.body
    num_tokens = request.body["max_tokens"]
    await send_head(writer)
    if is_chat:
        await send_event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for number in range(num_tokens):
        piece = {"delta": {"content": f" {number}"}} if is_chat else {"text": f" {number}"}
        await send_event(writer, {"choices": [{"index": 0, "finish_reason": None, **piece}]})
    last: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
    await send_event(writer, {"choices": [{"index": 0, "finish_reason": "length", **last}]})
    usage = {"prompt_tokens": len(request.body.get("prompt", "")) or 11, "completion_tokens": num_tokens}
    await send_event(writer, {"choices": [], "usage": usage})
    await send_end(writer)
