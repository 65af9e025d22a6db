"""Bodies are bounded, whether or not their length is announced."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.asgi import AsgiExchange
from tests.support.fake_server import COMPLETIONS, fake_server, make_context
from tprt.server.http.app import make_app
from tprt.server.tokenizer import Tokenizer

LIMIT = 1000


def body_of(num_bytes: int) -> bytes:
    frame = len(json.dumps({"prompt": ""}))
    return json.dumps({"prompt": "x" * (num_bytes - frame)}).encode()


@pytest.mark.parametrize(("num_bytes", "status"), [(LIMIT, 400), (LIMIT + 1, 413)])
def test_an_announced_length_is_held_against_the_limit(
    byte_tokenizer: Tokenizer, num_bytes: int, status: int
) -> None:
    with fake_server(byte_tokenizer, max_body_bytes=LIMIT) as server:
        headers = {"Content-Type": "application/json"}
        response = server.client.post(COMPLETIONS, content=body_of(num_bytes), headers=headers)
        # One that is let in has a prompt that is longer than the context.
        assert response.status_code == status
        assert response.json()["error"]["message"]


@pytest.mark.parametrize(("num_bytes", "status"), [(LIMIT, 400), (LIMIT + 1, 413), (50 * LIMIT, 413)])
def test_a_body_in_chunks_is_refused_once_it_is_too_large(
    byte_tokenizer: Tokenizer, num_bytes: int, status: int
) -> None:
    async def ask() -> AsgiExchange:
        _, context = make_context(byte_tokenizer, max_body_bytes=LIMIT)
        body = body_of(num_bytes)
        exchange = AsgiExchange(COMPLETIONS, [body[at : at + 100] for at in range(0, len(body), 100)])
        await exchange.run(make_app(context))
        return exchange

    exchange = asyncio.run(ask())
    assert exchange.status == status
    assert exchange.num_read <= LIMIT + 100
    assert json.loads(exchange.body)["error"]["message"]
