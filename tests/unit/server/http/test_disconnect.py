"""A client that leaves takes its sequences with it, at once."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.asgi import AsgiExchange
from tests.support.fake_server import CHAT, FakeEngine, make_context
from tprt.server.http.app import make_app
from tprt.server.tokenizer import Tokenizer


def leave_after(tokenizer: Tokenizer, when_streamed: bytes | None, **fields: object) -> FakeEngine:
    """Ask, leave once the answer has `when_streamed` (None: at the beginning), and return the engine."""

    async def ask() -> FakeEngine:
        engine, context = make_context(tokenizer)
        engine.stays_silent = when_streamed is None
        engine.answer = lambda prompt, sampling: "x" * 400
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        exchange = AsgiExchange(CHAT, [json.dumps(body).encode()])
        if when_streamed is None:
            asyncio.get_running_loop().call_later(0.02, exchange.left.set)
        else:
            exchange.on_body = lambda e: e.left.set() if when_streamed in e.body else None
        await exchange.run(make_app(context))
        return engine

    return asyncio.run(ask())


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
def test_whoever_leaves_before_the_first_token_aborts_all(byte_tokenizer: Tokenizer, fields: dict) -> None:
    engine = leave_after(byte_tokenizer, None, **fields)
    assert len(engine.submitted) == fields.get("n", 1)
    assert sorted(engine.aborted) == sorted(name for _, _, name in engine.submitted)
    assert engine.num_running == 0


@pytest.mark.parametrize("n", [1, 3])
def test_whoever_leaves_in_mid_stream_aborts_what_runs(byte_tokenizer: Tokenizer, n: int) -> None:
    engine = leave_after(byte_tokenizer, b'"content":"x', stream=True, n=n)
    assert len(engine.aborted) == n
    assert engine.num_running == 0


def test_a_request_that_is_refused_halfway_leaves_nothing_behind(byte_tokenizer: Tokenizer) -> None:
    async def ask() -> tuple[FakeEngine, AsgiExchange]:
        engine, context = make_context(byte_tokenizer)
        engine.stays_silent = True
        submit = engine.submit

        def refuse_the_third(*arguments: object) -> object:
            if len(engine.submitted) == 2:
                from tprt.errors import EngineBusyError

                raise EngineBusyError("full", 3)
            return submit(*arguments)

        engine.submit = refuse_the_third  # type: ignore[method-assign]
        body = {"messages": [{"role": "user", "content": "Hi"}], "n": 4}
        exchange = AsgiExchange(CHAT, [json.dumps(body).encode()])
        await exchange.run(make_app(context))
        return engine, exchange

    engine, exchange = asyncio.run(ask())
    assert exchange.status == 429
    assert exchange.headers["retry-after"] == "3"
    assert len(engine.aborted) == 2
    assert engine.num_running == 0
