"""Once the gate is closed nobody new comes in, and those inside can finish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive, Scope, Send

from tprt.server.http.drain_gate import DrainGate

WAIT_S = 10.0


class Work:
    """An application whose requests end when they are told to."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.may_end = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])
        await self.may_end.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def ask(gate: DrainGate, path: str) -> list[Message]:
    """Return what the request was answered."""
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("nobody reads the body of a request that is refused")

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"x-request-id", b"mine")]
    await gate({"type": "http", "path": path, "method": "POST", "headers": headers}, receive, send)
    return sent


def run(body: Callable[[Work, DrainGate], object]) -> None:
    async def timed() -> None:
        work = Work()
        async with asyncio.timeout(WAIT_S):
            await body(work, DrainGate(work))  # type: ignore[misc]

    asyncio.run(timed())


def test_those_inside_finish_and_others_are_refused_with_a_time_to_come_again() -> None:
    async def body(work: Work, gate: DrainGate) -> None:
        inside = [asyncio.ensure_future(ask(gate, "/v1/completions")) for _ in range(2)]
        await asyncio.sleep(0)
        assert gate.num_inside == 2
        gate.close()
        refusal, content = await ask(gate, "/v1/completions")
        headers = dict(refusal["headers"])
        assert (refusal["status"], headers[b"connection"]) == (503, b"close")
        assert headers[b"retry-after"].isdigit()
        assert headers[b"x-request-id"] == b"mine"
        assert b'"shutting_down"' in content["body"]
        assert (await ask(gate, "/ready"))[0]["status"] == 503
        assert not await gate.wait_until_empty(0.01)
        work.may_end.set()
        assert await gate.wait_until_empty(WAIT_S)
        assert [sent[0]["status"] for sent in await asyncio.gather(*inside)] == [200, 200]
        assert work.paths == ["/v1/completions"] * 2

    run(body)


def test_who_looks_on_is_let_in_and_does_not_hold_up_the_end() -> None:
    async def body(work: Work, gate: DrainGate) -> None:
        gate.close()
        looking = asyncio.ensure_future(ask(gate, "/health"))
        await asyncio.sleep(0)
        assert await gate.wait_until_empty(0.01)
        work.may_end.set()
        assert (await looking)[0]["status"] == 200

    run(body)


def test_a_request_that_fails_has_left() -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError

    async def body(_: Work, __: DrainGate) -> None:
        gate = DrainGate(fail)
        (error,) = await asyncio.gather(ask(gate, "/v1/completions"), return_exceptions=True)
        assert isinstance(error, ValueError)
        assert gate.num_inside == 0
        assert await gate.wait_until_empty(0.01)

    run(body)
