"""A stream has its headers soon, even when its first token takes long."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.asgi import AsgiExchange
from tests.support.fake_server import CHAT, make_context
from tprt.errors import EngineDeadError
from tprt.server.http import event_stream
from tprt.server.http.app import make_app
from tprt.server.tokenizer import Tokenizer


def test_headers_come_before_the_first_token_and_an_error_after_them_is_an_event(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "_HEADERS_AFTER_S", 0.01)

    async def ask() -> AsgiExchange:
        engine, context = make_context(byte_tokenizer)
        engine.stays_silent = True
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        exchange = AsgiExchange(CHAT, [json.dumps(body).encode()])
        serving = asyncio.ensure_future(exchange.run(make_app(context)))
        while not exchange.status:
            await asyncio.sleep(0.005)
        assert exchange.body == b""
        (stream,) = engine._running.values()
        stream.fail(EngineDeadError("gone"))
        await serving
        return exchange

    exchange = asyncio.run(ask())
    assert exchange.status == 200
    assert json.loads(exchange.body.removeprefix(b"data: "))["error"]["code"] == "engine_dead"
