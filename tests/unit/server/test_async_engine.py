"""Streams get their news, whoever reads slowly, leaves, waits too long or finds the engine full or dead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps

import pytest

from tests.unit.server.async_engines import READY, EdgeLane, Meter, make_engine, output, stats
from tprt.config import SupervisionConfig
from tprt.errors import EngineBusyError, EngineDeadError, InvalidRequestError
from tprt.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    FinishReason,
    GetStats,
    Hello,
    RequestFailed,
    SamplingParams,
)
from tprt.server import async_engine
from tprt.server.async_engine import AsyncEngine, Delta, RequestStream

NONE, STOP, LENGTH, ABORT = FinishReason.NONE, FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT
GREEDY = SamplingParams(temperature=0.0)
WAIT_S = 10.0
STALL_S = SupervisionConfig().stall_timeout_s


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an asynchronous test, with a deadline."""

    @wraps(test)
    def run(*args: object, **fixtures: object) -> None:
        async def body() -> None:
            async with asyncio.timeout(WAIT_S):
                await test(*args, **fixtures)

        asyncio.run(body())

    return run


@asynccontextmanager
async def engines(**settings: object) -> AsyncIterator[tuple[AsyncEngine, EdgeLane, Meter]]:
    """Yield a started engine with its lane and its meter; at the end nothing is left of it in the loop."""
    lane, meter = EdgeLane(), Meter()
    engine = make_engine(lane, meter, **settings)
    engine.start()
    await asyncio.sleep(0)
    try:
        yield engine, lane, meter
    finally:
        engine.close()
        assert lane.closed
        assert engine.num_running == 0
        assert len(meter.ends) == len(meter.begun)


async def settle() -> None:
    """Let what is due happen: what has come is taken in, and readers read it."""
    for _ in range(5):
        await asyncio.sleep(0.002)


async def read_all(stream: RequestStream) -> list[Delta]:
    async with stream:
        return [delta async for delta in stream]


@in_loop
async def test_each_stream_gets_its_own_tokens_and_its_end() -> None:
    async with engines() as (engine, lane, meter):
        first, second = engine.submit([1, 2], GREEDY, "a"), engine.submit([3], GREEDY, "b")
        assert [(name, completion.prompt_token_ids) for name, completion, _ in engine.running()] == [
            ("a", [1, 2]),
            ("b", [3]),
        ]
        reads = [asyncio.ensure_future(read_all(stream)) for stream in (first, second)]
        for message in (output((1, 9, NONE), (0, 7, NONE)), output((0, 8, STOP)), output((1, 5, LENGTH))):
            await settle()
            lane.bring(message)
        one, two = await asyncio.gather(*reads)
        assert [(delta.token_ids, delta.finish_reason) for delta in one] == [((7,), None), ((8,), "stop")]
        assert [(delta.token_ids, delta.finish_reason) for delta in two] == [((9,), None), ((5,), "length")]
        assert (meter.begun, meter.num_tokens, meter.ends) == ([2, 1], 4, ["stop", "length"])
        assert lane.sent_of(AbortRequest) == []
        assert (engine.num_running, engine.running()) == (0, [])


@in_loop
async def test_what_comes_while_a_reader_is_busy_is_one_delta() -> None:
    async with engines() as (engine, lane, _):
        stream = engine.submit([1], GREEDY)
        for token in range(100):
            lane.bring(output((0, token, NONE)))
        await settle()
        assert (await anext(stream)).token_ids == tuple(range(100))
        lane.bring(output((0, 100, NONE)))
        lane.bring(output((0, 101, LENGTH)))
        await settle()
        assert await anext(stream) == Delta("", (100, 101), (), "length")
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


@in_loop
async def test_news_whose_signal_was_taken_by_a_send_are_found_at_once() -> None:
    async with engines() as (engine, lane, _):
        stream = engine.submit([1], GREEDY)
        await settle()
        lane.bring(output((0, 7, STOP)))
        # In the same turn of the loop, before the signal is looked at.
        other = engine.submit([2], GREEDY)
        assert (await anext(stream)).token_ids == (7,)
        other.close()


@in_loop
async def test_leaving_a_stream_aborts_its_sequence_at_once_and_only_then() -> None:
    async with engines() as (engine, lane, meter):

        async def leave_after_one() -> None:
            async with engine.submit([1], GREEDY) as stream:
                async for _ in stream:
                    return

        lane.bring(output((0, 7, NONE)))
        await leave_after_one()
        assert lane.sent[-1] == AbortRequest(0)
        assert (engine.num_running, meter.ends) == (0, ["abort"])

        lane.bring(output((1, 7, STOP)))
        await read_all(engine.submit([1], GREEDY))
        assert len(lane.sent_of(AbortRequest)) == 1


@in_loop
async def test_a_reader_that_is_cancelled_while_it_waits_aborts_its_sequence() -> None:
    async with engines() as (engine, lane, _):
        reading = asyncio.ensure_future(read_all(engine.submit([1], GREEDY)))
        await settle()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert lane.sent[-1] == AbortRequest(0)


@in_loop
async def test_a_refusal_of_the_engine_is_raised_by_the_reader() -> None:
    async with engines() as (engine, lane, meter):
        stream = engine.submit([1], GREEDY)
        lane.bring(RequestFailed(0, "token 1 is outside the vocabulary"))
        with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
            await anext(stream)
        assert meter.ends == ["error"]


@in_loop
async def test_what_can_never_be_served_is_refused_before_it_is_sent() -> None:
    async with engines() as (engine, lane, meter):
        with pytest.raises(InvalidRequestError, match="stop strings need a tokenizer"):
            engine.submit([1], SamplingParams(stop=("a",)))
        with pytest.raises(InvalidRequestError, match="token ids"):
            engine.submit([-1], GREEDY)
        assert lane.sent_of(AddRequest) == []
        assert meter.begun == []


@in_loop
async def test_beyond_the_places_and_the_queue_a_request_is_refused_until_one_ends() -> None:
    settings = {"scheduler__max_num_seqs": 2, "server__max_queued_requests": 1}
    async with engines(**settings) as (engine, lane, meter):
        engine.require_places(3)
        streams = [engine.submit([1], GREEDY)]
        with pytest.raises(EngineBusyError, match="1 requests"):
            engine.require_places(3)
        with pytest.raises(InvalidRequestError, match="takes 3 at a time"):
            engine.require_places(4)
        streams += [engine.submit([1], GREEDY) for _ in range(2)]
        with pytest.raises(EngineBusyError, match="3 requests") as caught:
            engine.submit([1], GREEDY)
        assert caught.value.retry_after_s >= 1
        assert (len(lane.sent_of(AddRequest)), len(meter.begun)) == (3, 3)
        streams[0].close()
        streams.append(engine.submit([1], GREEDY))
        for stream in streams:
            stream.close()


@in_loop
async def test_at_its_deadline_a_request_ends_with_what_it_has() -> None:
    async with engines(server__request_timeout_s=0.05) as (engine, lane, _):
        stream = engine.submit([1], GREEDY)
        lane.bring(output((0, 7, NONE)))
        assert (await anext(stream)).token_ids == (7,)
        assert await anext(stream) == Delta("", (), (), "abort")
        assert lane.sent[-1] == AbortRequest(0)


@in_loop
async def test_at_its_deadline_a_request_without_a_token_is_told_to_come_again() -> None:
    async with engines(server__request_timeout_s=0.05) as (engine, lane, meter):
        with pytest.raises(EngineBusyError, match=r"0\.05 s \(server\.request_timeout_s\)"):
            await read_all(engine.submit([1], GREEDY))
        assert lane.sent[-1] == AbortRequest(0)
        assert meter.ends == ["abort"]


@in_loop
async def test_a_request_that_ends_in_time_has_no_deadline_left() -> None:
    async with engines(server__request_timeout_s=0.02) as (engine, lane, meter):
        lane.bring(output((0, 7, STOP)))
        await read_all(engine.submit([1], GREEDY))
        await asyncio.sleep(0.05)
        assert (meter.ends, lane.sent_of(AbortRequest)) == (["stop"], [])


@in_loop
async def test_when_the_engine_fails_every_stream_raises_the_cause_after_what_had_come() -> None:
    async with engines() as (engine, lane, meter):
        streams = [engine.submit([1], GREEDY) for _ in range(3)]
        waiting = asyncio.ensure_future(anext(streams[2]))
        lane.bring(output((0, 7, NONE)))
        await settle()
        lane.bring(EngineFailed("rank 1 was killed"))
        with pytest.raises(EngineDeadError, match="rank 1 was killed"):
            await waiting
        assert (await anext(streams[0])).token_ids == (7,)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="rank 1 was killed"):
                await anext(stream)
        with pytest.raises(EngineDeadError, match="rank 1 was killed"):
            engine.submit([1], GREEDY)
        healthy, reason = engine.is_healthy()
        assert not healthy
        assert "rank 1" not in reason
        assert meter.ends == ["error"] * 3


@in_loop
async def test_when_the_coordinator_is_gone_every_stream_raises() -> None:
    async with engines() as (engine, lane, _):
        stream = engine.submit([1], GREEDY)
        lane.lose()
        with pytest.raises(EngineDeadError, match="the coordinator has ended"):
            await anext(stream)


@in_loop
async def test_abort_all_ends_every_stream_with_what_it_has() -> None:
    async with engines() as (engine, lane, _):
        streams = [engine.submit([1], GREEDY) for _ in range(2)]
        lane.bring(output((0, 7, NONE)))
        await settle()
        engine.abort_all()
        assert await anext(streams[0]) == Delta("", (7,), (), "abort")
        assert await anext(streams[1]) == Delta("", (), (), "abort")
        assert lane.sent_of(AbortRequest) == [AbortRequest(0), AbortRequest(1)]


@in_loop
async def test_it_says_hello_is_ready_when_greeted_and_then_asks_for_stats() -> None:
    async with engines() as (engine, lane, meter):
        assert lane.sent == [Hello()]
        assert engine.ready is None
        lane.bring(READY)
        await engine.wait_until_ready()
        assert engine.ready == READY
        while GetStats() not in lane.sent:
            await asyncio.sleep(0.01)
        lane.bring(stats(num_running=3))
        await settle()
        assert engine.stats is not None
        assert engine.stats.num_running == 3
        assert meter.stats == [engine.stats]


@in_loop
async def test_ranks_that_took_the_place_of_others_are_asked_for_their_size() -> None:
    async with engines() as (engine, lane, _):
        lane.bring(READY)
        lane.bring(stats(epoch=1, is_serving=False))
        await settle()
        assert lane.sent_of(Hello) == [Hello()]
        assert engine.is_healthy()[0]
        lane.bring(stats(epoch=1))
        await settle()
        assert lane.sent_of(Hello) == [Hello()] * 2


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let seconds pass for the engine in no time."""
    passed = [0.0]

    def pass_time(seconds: float) -> None:
        passed[0] += seconds

    monkeypatch.setattr(async_engine, "monotonic", lambda: time.monotonic() + passed[0])
    return pass_time


@in_loop
async def test_while_ranks_are_replaced_an_answer_is_progress(pass_time: Callable[[float], None]) -> None:
    async with engines() as (engine, lane, _):
        stream = engine.submit([1], GREEDY)
        lane.bring(READY)
        await settle()
        pass_time(STALL_S + 1)
        assert not engine.is_healthy()[0]
        lane.bring(stats(is_serving=False, num_steps=9, last_step_s=100.0))
        await settle()
        assert engine.is_healthy() == (True, "the ranks are being replaced; requests go on afterwards")
        lane.bring(stats(is_serving=True, num_steps=9, last_step_s=100.0))
        await settle()
        assert not engine.is_healthy()[0]
        lane.bring(stats(is_serving=True, num_steps=10, last_step_s=0.0))
        await settle()
        assert engine.is_healthy()[0]
        stream.close()


@in_loop
async def test_work_without_progress_is_not_healthy_until_a_token_comes(
    pass_time: Callable[[float], None],
) -> None:
    async with engines() as (engine, lane, _):
        assert engine.is_healthy() == (True, "the ranks are not ready yet")
        lane.bring(READY)
        await settle()
        pass_time(STALL_S + 1)
        assert engine.is_healthy() == (True, "nothing to do")
        stream = engine.submit([1], GREEDY)
        pass_time(STALL_S + 1)
        healthy, reason = engine.is_healthy()
        assert not healthy
        assert "no progress" in reason
        lane.bring(output((0, 7, NONE)))
        await settle()
        assert engine.is_healthy()[0]
        stream.close()


@in_loop
async def test_an_engine_that_does_not_answer_is_not_healthy_even_with_nothing_to_do(
    pass_time: Callable[[float], None],
) -> None:
    async with engines() as (engine, lane, _):
        lane.bring(READY)
        while GetStats() not in lane.sent:
            await asyncio.sleep(0.01)
        assert engine.is_healthy()[0]
        pass_time(STALL_S + 1)
        assert not engine.is_healthy()[0]
        lane.bring(stats())
        await settle()
        assert engine.is_healthy() == (True, "nothing to do")


@in_loop
async def test_an_engine_of_two_replicas_is_well_while_one_is_and_streams_outlive_the_other() -> None:
    lanes, meter = [EdgeLane(), EdgeLane()], Meter()
    engine = make_engine(lanes, meter)
    engine.start()
    for lane in lanes:
        lane.bring(READY)
        lane.bring(stats(num_running=1))
    await engine.wait_until_ready()
    stream = engine.submit([1, 2, 3], GREEDY)
    (home,) = [number for number, lane in enumerate(lanes) if lane.sent_of(AddRequest)]
    other = 1 - home
    lanes[home].lose()
    while not lanes[other].sent_of(AddRequest):
        await asyncio.sleep(0)
    healthy, reason = engine.is_healthy()
    assert healthy
    assert f"replica {home}: the engine has ended" in reason
    assert [view.state.value for view in engine.replicas()][home] == "lost"
    assert (meter.stats_of[home].is_serving, meter.stats_of[home].num_running) == (False, 0)
    # Its lane signals for nobody any more.
    assert not any(asyncio.get_running_loop().remove_reader(fd) for fd in lanes[home].filenos())
    lanes[other].bring(output((0, 7, LENGTH)))
    async with stream:
        assert [delta.token_ids async for delta in stream] == [(7,)]
    lanes[other].lose()
    while engine.is_healthy()[0]:
        await asyncio.sleep(0)
    with pytest.raises(EngineDeadError):
        engine.submit([1, 2, 3], GREEDY)
    engine.close()


@in_loop
async def test_a_stream_that_has_lost_two_replicas_ends_with_the_cause() -> None:
    lanes, meter = [EdgeLane(), EdgeLane(), EdgeLane()], Meter()
    engine = make_engine(lanes, meter)
    engine.start()
    for lane in lanes:
        lane.bring(READY)
    await engine.wait_until_ready()
    stream = engine.submit([1, 2, 3], GREEDY)
    for _ in range(2):
        holders = [lane for lane in lanes if lane.sent_of(AddRequest) and lane.loss is None]
        while not holders:
            await asyncio.sleep(0)
            holders = [lane for lane in lanes if lane.sent_of(AddRequest) and lane.loss is None]
        holders[0].lose()
    with pytest.raises(EngineDeadError, match="two replicas"):
        await anext(stream)
    assert meter.ends == ["error"]
    assert engine.is_healthy()[0]
    engine.close()
