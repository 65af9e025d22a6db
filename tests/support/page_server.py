"""The live page in front of an engine that runs no model, served by a thread of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import StreamingResponse

from tprt.config import Config, ModelConfig, RuntimeConfig
from tprt.messages import EngineReady, EngineStats, SamplingParams
from tprt.server.completion import Completion
from tprt.server.http.auth import RequireKey
from tprt.server.http.context import ServerContext
from tprt.server.metrics import ServerMetrics
from tprt.server.page import make_page_router
from tprt.transport.heartbeat import HeartbeatReader, HeartbeatWriter, Phase
from tprt.transport.heartbeat_file import create_heartbeats

MODEL = "Tiny & <b>Model</b>"
SECRET = "what-was-asked-is-never-shown"
DEADLINE_S = 10.0


class FakeEngine:
    """What the page asks of an engine; the attributes are for tests to change."""

    def __init__(self) -> None:
        self.ready: EngineReady | None = EngineReady(0, 2, 100, 16, 256)
        self.stats: EngineStats | None = EngineStats(1, True, 3, 2, 0.4, 60, 100, 4, 1000, 250, 5000, 700, 0.02)
        self.health = (True, "steps are finished as they come")
        self.requests: list[tuple[str, Completion, float]] = []

    def is_healthy(self) -> tuple[bool, str]:
        return self.health

    @property
    def num_running(self) -> int:
        return len(self.requests)

    def running(self) -> list[tuple[str, Completion, float]]:
        return self.requests


class PageServer:
    """A page, its engine and its ranks, all to be changed by tests."""

    def __init__(self, folder: Path, api_keys: tuple[str, ...] = ()) -> None:
        self.engine = FakeEngine()
        self.heartbeats = folder / "heartbeats"
        create_heartbeats(self.heartbeats, 2)
        self.ranks = [HeartbeatWriter.open(self.heartbeats, rank, epoch=1) for rank in range(2)]
        self._seconds_back = 0
        self.metrics = ServerMetrics(MODEL, [self._open_heartbeats], self._clock)
        self.words = ["An ", "answer ", "with <i>markup</i> ", "in ", "it."]
        self.pause_s = 0.01
        self.asked: list[dict[str, object]] = []
        context = ServerContext(
            config=Config(model=ModelConfig(path="nowhere"), runtime=RuntimeConfig(device="cpu")),
            engine=self.engine,  # type: ignore[arg-type]
            tokenizer=None,
            metrics=self.metrics,
            model_name=MODEL,
            created_s=int(time.time()) - 75,
            api_keys=api_keys,
            heartbeats=[self._open_heartbeats],
        )
        self.app = FastAPI(openapi_url=None)
        self.app.include_router(make_page_router(context))
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"], response_model=None)
        if api_keys:
            self.app.add_middleware(RequireKey, keys=api_keys)

    def run_ranks(self) -> None:
        """Let rank 0 be two steps ahead of rank 1."""
        self.ranks[0].begin_step(41, Phase.DECODE)
        self.ranks[1].begin_step(39, Phase.PREFILL)
        self.ranks[1].enter_layer(7)
        self.ranks[1].enter_collective(12, "all_reduce")

    def run_requests(self) -> None:
        """Let three requests run, with ids and tokens that differ."""
        for i in range(3):
            completion = Completion([7] * (10 + i), SamplingParams(max_tokens=64, stop=(SECRET,)))
            completion.token_ids += [9] * (5 * i)
            self.engine.requests.append((f"chatcmpl-{i}-0123456789abcdef", completion, time.monotonic() - i))

    def generate(self, num_tokens: int) -> None:
        """Count a request of that many tokens."""
        request = self.metrics.begin(0, 20, SamplingParams())
        for _ in range(num_tokens):
            request.on_tokens(1)
        request.on_end("stop")

    def live_for(self, num_seconds: int) -> None:
        """Let so many seconds pass at ten tokens a second, up to now."""
        assert self.engine.stats is not None
        for self._seconds_back in range(num_seconds, 0, -1):
            self.generate(10)
            self.metrics.set_engine(0, self.engine.stats)
        self._seconds_back = 0

    def _clock(self) -> float:
        return time.monotonic() - self._seconds_back

    def close(self) -> None:
        for writer in self.ranks:
            writer.close()

    def _open_heartbeats(self) -> HeartbeatReader | None:
        return HeartbeatReader.open(self.heartbeats)

    async def _chat(self, request: Request) -> StreamingResponse:
        self.asked.append(json.loads(await request.body()))
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[bytes]:
        for word in self.words:
            await asyncio.sleep(self.pause_s)
            yield _event({"choices": [{"index": 0, "delta": {"content": word}}]})
        yield _event({"choices": [], "usage": {"completion_tokens": len(self.words)}})
        yield b"data: [DONE]\n\n"


def _event(payload: dict[str, object]) -> bytes:
    return f"data: {json.dumps(payload)}\n\n".encode()


@contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[str]:
    """Serve `app` on the loopback until the block ends; gives the address."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="page server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        listener.close()
        assert not thread.is_alive()
