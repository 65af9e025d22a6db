"""The soak notices what is wrong with answers, with memory, with refusals. Servers are of few lines."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from scripts.check_structured_output import SCHEMAS, judge
from scripts.soak_bad_requests import bad_requests, cut, post
from scripts.soak_cases import Case
from scripts.soak_clients import Client, Target
from scripts.soak_tally import Tally
from scripts.soak_verdict import judge_descriptors, wait_until_idle
from scripts.soak_watch import Sample, second_half
from tests.support.sse_server import Answer, Request, Writer, send_completion, send_json, serving

CASES = [Case("completions", [5, 6], 3, " 0 1 2"), Case("chat", [{"role": "user", "content": "x"}], 2, " 0 1")]


def soak(answer: Answer, thing: Callable[[Client], Awaitable[None]], times: int = 4) -> Tally:
    """Let a client do one thing some times."""

    async def run() -> Tally:
        tally = Tally()
        async with serving(answer) as server:
            client = Client(Target(server.base_url, "tiny", CASES), tally, seed=1)
            for _ in range(times):
                await thing(client)
        return tally

    return asyncio.run(run())


def busy(status: int, headers: str) -> Answer:
    async def answer(request: Request, writer: Writer) -> None:
        writer.write(f"HTTP/1.1 {status} Busy\r\n{headers}Content-Length: 0\r\n\r\n".encode())
        await writer.drain()

    return answer


async def send_less(request: Request, writer: Writer) -> None:
    short = {**request.body, "max_tokens": request.body["max_tokens"] - 1}
    await send_completion(Request(request.method, request.path, request.headers, short), writer)


def test_a_stream_that_is_as_offline_is_counted() -> None:
    for thing in (Client._stream, Client._dawdle):
        tally = soak(send_completion, thing, 2)
        assert tally.violations == {}
        assert sum(number for kind, number in tally.counts.items() if "equal to offline" in kind) == 2


def test_a_stream_that_lacks_a_token_is_a_violation() -> None:
    assert soak(send_less, Client._stream).violations == {"streamed, other than offline": 4}
    assert soak(send_less, Client._dawdle, 1).violations == {"read late, other than offline": 1}


def test_a_whole_answer_is_compared_too() -> None:
    async def answer(request: Request, writer: Writer) -> None:
        is_chat = request.path.startswith("/v1/chat")
        text = " 0 1" if is_chat else " 0 1 2 3"
        choice: dict[str, Any] = {"message": {"content": text}} if is_chat else {"text": text}
        usage = {"completion_tokens": request.body["max_tokens"]}
        await send_json(writer, 200, {"choices": [choice], "usage": usage})

    tally = soak(answer, Client._ask_for_all, 8)
    assert set(tally.violations) == {"whole, other than offline"}
    assert tally.counts["whole, equal to offline"] + tally.violations["whole, other than offline"] == 8
    assert tally.counts["whole, equal to offline"] > 0


def test_busy_is_fine_only_when_it_says_when_to_come_again() -> None:
    tally = soak(busy(429, "Retry-After: 0\r\n"), Client._stream)
    assert (dict(tally.counts), dict(tally.violations)) == ({"announced 429": 4}, {})
    assert soak(busy(503, ""), Client._stream).violations == {"HTTP 503 for a good request": 4}
    assert soak(busy(500, "Retry-After: 0\r\n"), Client._stream).violations["HTTP 500 for a good request"] == 4


def test_leaving_is_never_a_violation() -> None:
    async def wait(request: Request, writer: Writer) -> None:
        await asyncio.sleep(60)

    async def leave_soon(client: Client) -> None:
        client._draw.uniform = lambda low, high: 0.05  # type: ignore[method-assign]
        await client._leave_early()
        await client._leave_at_once()

    tally = soak(wait, leave_soon, 2)
    assert (dict(tally.counts), dict(tally.violations)) == (
        {"left in mid-stream or queue": 2, "left before the headers": 2},
        {},
    )


def test_a_bad_request_that_is_served_or_fails_otherwise_is_a_violation() -> None:
    requests = {request.kind: request for request in bad_requests("tiny")}
    assert len(requests) >= 25
    for request in requests.values():
        assert not request.refuses(200)
        assert not request.refuses(500)
    assert requests["wrong type"].refuses(400)
    assert not requests["wrong type"].refuses(None)
    assert not requests["unknown model"].refuses(400)
    assert requests["huge body"].refuses(None)


def test_bad_requests_are_what_they_are_called() -> None:
    data = {request.kind: request.data for request in bad_requests("tiny")}
    with pytest.raises(UnicodeDecodeError):
        data["not UTF-8"].decode()
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(data["malformed JSON"].partition(b"\r\n\r\n")[2])
    head, _, body = data["wrong type"].partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body)["max_tokens"] == "many"


def test_half_a_request_is_never_a_whole_one() -> None:
    whole = post("/v1/completions", b"{}")
    halves = {cut(random.Random(seed), whole) for seed in range(200)}
    assert all(whole.startswith(half) and half != whole for half in halves)
    assert len(halves) > 50


def samples(pid: int, mib: list[float]) -> list[Sample]:
    return [Sample(float(at_s), pid, value, 5) for at_s, value in enumerate(mib)]


def test_memory_is_judged_by_the_second_half() -> None:
    flat = second_half(samples(7, [float(value) for value in range(50)] + [50.0] * 50))
    assert flat is not None
    assert flat.growth_mib == pytest.approx(0.0, abs=0.1)
    leak = second_half(samples(7, [100 + 0.5 * value for value in range(100)]))
    assert leak is not None
    assert leak.growth_mib == pytest.approx(24.5, abs=0.6)


def test_memory_of_a_process_that_took_the_place_of_another_is_its_own() -> None:
    assert second_half(samples(7, [900.0] * 50) + samples(8, [100.0] * 3)) is None


def test_descriptors_that_stay_open_are_a_violation() -> None:
    tally = Tally()
    before = {
        "server": Sample(0.0, 7, 1.0, 20),
        "rank 0": Sample(0.0, 8, 1.0, 20),
        "gone": Sample(0.0, 9, 1.0, 1),
    }
    after = {"server": Sample(9.0, 7, 1.0, 60), "rank 0": Sample(9.0, 8, 1.0, 21), "gone": None}
    judge_descriptors(before, after, tally)
    assert dict(tally.violations) == {"descriptors of server are flat": 1}
    assert dict(tally.counts) == {"checked: descriptors of rank 0 are flat": 1}


@pytest.mark.parametrize(("free", "running", "is_idle"), [(8, 0, True), (7, 0, False), (8, 1, False)])
def test_a_block_or_a_request_that_is_left_is_a_violation(
    free: int, running: int, is_idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Metrics:
        async def get(self, path: str) -> Any:
            lines = [
                "# TYPE vllm:num_requests_running gauge",
                f'vllm:num_requests_running{{model_name="x"}} {running}.0',
                'vllm:num_requests_waiting{model_name="x"} 0.0',
                'tprt_kv_blocks{model_name="x"} 8.0',
                f'tprt_kv_blocks_free{{model_name="x"}} {free}.0',
            ]
            return type("Response", (), {"body": "\n".join(lines).encode()})

    monkeypatch.setattr("scripts.soak_verdict._NEWS_S", 0.0)
    monkeypatch.setattr("scripts.soak_verdict._QUIET_S", 0.0)
    tally = Tally()
    asyncio.run(wait_until_idle(Metrics(), tally))  # type: ignore[arg-type]
    assert bool(tally.violations) is not is_idle
    assert bool(tally.counts) is is_idle


def test_the_first_violations_are_told_and_all_are_counted() -> None:
    tally = Tally()
    for number in range(100):
        tally.violate("wrong", f"case {number}")
    assert "wrong: case 0" in tally.table()
    assert "wrong: case 99" not in tally.table()
    assert tally.violations["wrong"] == 100


def test_an_output_is_judged_by_its_schema() -> None:
    _, schema = SCHEMAS["numbers"]
    good = {"celsius": 20, "share": 0.5, "above": 6, "is_sunny": True}
    assert judge(schema, json.dumps(good), "stop") is None
    assert judge(schema, json.dumps(good), "length") == "ended by length"
    assert "not JSON" in str(judge(schema, json.dumps(good)[:-1], "stop"))
    for wrong in ({"celsius": 99}, {"share": "half"}, {"above": 8}, {"more": 1}):
        assert judge(schema, json.dumps(good | wrong), "stop")
