"""A load against a server of the test's own: what was asked for comes, what goes wrong is counted by kind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from launch.bench.serve_http import HttpClient
from launch.bench.serve_load import Lengths, RequestForm
from launch.bench.serve_run import (
    EndpointError,
    Load,
    LoadOutcome,
    find_vocab_size,
    first_model,
    run_load,
)
from launch.bench.serve_stream import Endpoint, RequestResult, StreamTimes
from tests.support.sse_server import (
    Answer,
    Request,
    SseServer,
    Writer,
    send_completion,
    send_end,
    send_event,
    send_head,
    send_json,
    serving,
)
from tprt.errors import ConfigError

TPRT = str(Path(sys.executable).with_name("tprt"))


def drive(answer: Answer, load: Load, endpoint: Endpoint = "completions") -> tuple[SseServer, LoadOutcome]:
    async def run() -> tuple[SseServer, LoadOutcome]:
        async with serving(answer) as server:
            client = HttpClient(server.base_url, {})
            try:
                form = RequestForm("tiny", endpoint, 199)
                return server, await run_load(client, form, load, lambda result: None)
            finally:
                client.close()

    return asyncio.run(run())


def fails_with(answer: Answer, timeout_s: float = 20.0) -> RequestResult:
    _, outcome = drive(answer, Load(1, Lengths(4, 4), num_warmups=0, timeout_s=timeout_s))
    (result,) = outcome.results
    assert not result.is_good
    return result


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_every_token_of_every_request_is_counted(endpoint: Endpoint) -> None:
    load = Load(6, Lengths(8, 5, 0.5), num_warmups=2, max_concurrency=3)
    server, outcome = drive(send_completion, load, endpoint)
    assert len(server.requests) == 8
    assert not outcome.was_interrupted
    for sent, result in zip(server.requests[2:], outcome.results, strict=True):
        assert result.is_good
        assert result.output_len == sent.body["max_tokens"] == len(result.text.split())
        assert len(result.itls_s) == result.output_len - 1
        assert 0 < result.ttft_s <= result.latency_s
        assert result.latency_s == pytest.approx(result.ttft_s + sum(result.itls_s))
        assert result.prompt_len == (11 if endpoint == "chat" else len(sent.body["prompt"]))


def test_no_more_run_at_a_time_than_allowed_and_connections_are_kept() -> None:
    server, outcome = drive(send_completion, Load(20, Lengths(4, 8), num_warmups=0, max_concurrency=4))
    assert all(result.is_good for result in outcome.results)
    assert server.most_at_once == 4
    assert server.num_connections == 4


def test_the_same_seed_sends_the_same_requests() -> None:
    first, again, other = (
        [request.body for request in drive(send_completion, Load(3, Lengths(6, 2, 0.5), seed=seed))[0].requests]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_kept_connection_that_the_server_has_closed_is_made_anew() -> None:
    async def answer_and_close(request: Request, writer: Writer) -> None:
        await send_completion(request, writer)
        writer.close()

    load = Load(5, Lengths(4, 2), max_concurrency=1)
    server, outcome = drive(answer_and_close, load)
    assert all(result.is_good for result in outcome.results)
    assert len(server.requests) == server.num_connections == 6


def test_a_status_that_is_an_error_is_its_own_kind() -> None:
    result = fails_with(lambda request, writer: send_json(writer, 429, {"error": {"message": "queue full"}}))
    assert result.error_kind == "HTTP 429"
    assert "queue full" in result.error


def test_a_stream_that_ends_early_is_no_success() -> None:
    async def break_off(request: Request, writer: Writer) -> None:
        await send_head(writer)
        await send_event(writer, {"choices": [{"index": 0, "text": "a"}]})
        writer.transport.abort()

    async def forget_the_end(request: Request, writer: Writer) -> None:
        await send_head(writer)
        await send_event(writer, {"choices": [{"index": 0, "text": "a"}]})
        writer.write(b"0\r\n\r\n")

    assert fails_with(break_off).error_kind == "connection lost"
    assert fails_with(forget_the_end).error_kind == "stream cut short"


def test_an_error_in_the_stream_is_no_success() -> None:
    async def answer(request: Request, writer: Writer) -> None:
        await send_head(writer)
        await send_event(writer, {"error": {"message": "a rank has died"}})
        await send_end(writer)

    result = fails_with(answer)
    assert result.error_kind == "error in the stream"
    assert "a rank has died" in result.error


def test_a_stream_without_tokens_and_an_event_that_is_no_json_are_errors() -> None:
    def answer_with(*events: str) -> Answer:
        async def answer(request: Request, writer: Writer) -> None:
            await send_head(writer)
            for event in events:
                await send_event(writer, event)
            await send_end(writer)

        return answer

    assert fails_with(answer_with()).error_kind == "no tokens"
    for event in ("{", "[]", '{"choices": 7}', '{"choices": [7]}', '{"choices": [{"delta": 7}]}'):
        assert fails_with(answer_with(event)).error_kind == "bad event"


def test_a_request_that_does_not_end_has_a_deadline() -> None:
    async def wait(request: Request, writer: Writer) -> None:
        await asyncio.sleep(60)

    assert fails_with(wait, timeout_s=0.05).error_kind == "deadline"


def test_a_warm_up_that_fails_ends_the_measurement() -> None:
    with pytest.raises(EndpointError, match="warm-up failed: HTTP 500"):
        drive(lambda request, writer: send_json(writer, 500, {}), Load(3, Lengths(4, 4)))


def test_time_is_that_of_events_with_tokens() -> None:
    clock = iter(float(second) for second in range(10, 20))
    result = RequestResult(3, start_s=9.0)
    times = StreamTimes(result, lambda: next(clock))
    delta: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": ""},
        {"content": "b"},
    ]
    for piece in delta:
        times.feed(f"data: {json.dumps({'choices': [{'delta': piece}]})}\n\n".encode())
    times.feed(b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n')
    times.feed(
        b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}\n\ndata: [DONE]\n\n'
    )
    times.finish()
    assert (result.ttft_s, result.itls_s, result.latency_s) == (2.0, [1.0, 1.0], 4.0)
    assert (result.prompt_len, result.output_len, result.text) == (7, 4, "ab")
    assert result.error_kind == ""


def ask(question: Callable[[HttpClient], Awaitable[object]], answer: Answer = send_completion) -> object:
    async def run() -> object:
        async with serving(answer) as server:
            client = HttpClient(f"{server.base_url}/v1", {})
            try:
                return await question(client)
            finally:
                client.close()

    return asyncio.run(run())


def test_the_server_is_asked_for_its_model_and_its_vocabulary() -> None:
    assert ask(first_model) == "tiny"
    assert ask(lambda client: find_vocab_size(client, "tiny")) == 199


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(EndpointError, match=r"GET /v1/models: cannot connect: 127\.0\.0\.1:1"):
        asyncio.run(first_model(HttpClient("http://127.0.0.1:1", {})))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port"])
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--base-url"):
        HttpClient(url, {})


async def command(base_url: str, *options: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(TPRT, "bench", "serve", "--base-url", base_url, "--input-len", "8", *options),
        env={**os.environ, "OPENAI_API_KEY": "secret"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    async with asyncio.timeout(30):
        output, _ = await process.communicate()
    return process.returncode, output.decode()


def test_the_command_prints_the_names_of_vllm() -> None:
    async def run() -> None:
        async with serving(send_completion) as server:
            options = ("--num-prompts", "4", "--output-len", "3", "--goodput", "ttft:60000", "e2el:60000")
            code, output = await ended(await command(server.base_url, *options, "--json", "--detailed"))
            assert code == 0
            posts = [request for request in server.requests if request.path == "/v1/completions"]
            assert len(posts) == 5
            assert all(post.headers["authorization"] == "Bearer secret" for post in posts)
        figures = json.loads(output)
        assert (figures["model_id"], figures["completed"], figures["failed"]) == ("tiny", 4, 0)
        assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (32, 12)
        assert figures["request_goodput"] == figures["request_throughput"] > 0
        assert figures["output_lens"] == [3] * 4
        assert 0 < figures["p50_ttft_ms"] <= figures["p99_ttft_ms"] <= figures["p99_e2el_ms"]

    asyncio.run(run())


def test_ctrl_c_shows_what_has_ended_so_far() -> None:
    async def answer_two(request: Request, writer: Writer) -> None:
        if len(asked) == 2:
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(60)
        asked.append(request)
        await send_completion(request, writer)

    asked: list[Request] = []

    async def run() -> None:
        nonlocal process
        async with serving(answer_two) as server:
            options = ("--num-prompts", "9", "--max-concurrency", "1", "--num-warmups", "0")
            process = await command(server.base_url, *options)
            code, output = await ended(process)
        assert code == 130
        assert f"{'Successful requests:':<40} 2" in output
        assert f"{'Failed requests:':<40} 0" in output

    process: asyncio.subprocess.Process
    asyncio.run(run())


def test_the_command_fails_when_no_request_succeeds() -> None:
    async def run() -> None:
        async with serving(lambda request, writer: send_json(writer, 503, {})) as server:
            code, output = await ended(
                await command(server.base_url, "--num-prompts", "3", "--num-warmups", "0")
            )
        assert code == 1
        assert f"{'HTTP 503:':<40} 3" in output

    asyncio.run(run())
