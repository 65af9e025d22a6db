"""The loop over both kinds of lanes, as clients see it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from tests.unit.coordinator.engine_of_threads import (
    DEADLINE_S,
    NUM_BLOCKS,
    Make,
    assert_set,
)
from tprt.coordinator.limits import SchedulerLimits
from tprt.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    FinishReason,
    Hello,
    SamplingParams,
    Shutdown,
    StepInput,
    WorkerReady,
)
from tprt.transport.codec import encode

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def test_a_hello_is_answered_once_all_ranks_are_ready_with_the_fewest_blocks_of_any_rank(make: Make) -> None:
    engine = make(3).start()
    client = engine.client()
    client.send(Hello())
    client.wait(lambda: bool(client.ready))
    assert client.ready == [EngineReady(0, 3, NUM_BLOCKS, 4, 200)]


def test_a_hello_before_the_ranks_are_ready_is_not_lost(make: Make) -> None:
    engine = make(1)
    may_load = threading.Event()
    engine.ranks[0].on_start = lambda _: assert_set(may_load)
    engine.start()
    client = engine.client()
    client.send(Hello())
    assert client.lane.receive(0.1) is None
    may_load.set()
    client.wait(lambda: bool(client.ready))


def test_a_request_gets_every_token_once_in_order_and_its_end(make: Make) -> None:
    client = make().start().client()
    client.add(7, prompt_len=3, max_tokens=5)
    client.wait(lambda: 7 in client.reasons)
    assert client.tokens[7] == [3, 4, 5, 6, 7]
    assert client.reasons[7] == FinishReason.LENGTH


def test_all_ranks_receive_every_step(make: Make) -> None:
    engine = make(3).start()
    client = engine.client()
    client.add(7, prompt_len=3, max_tokens=5)
    client.wait(lambda: 7 in client.reasons)
    client.send(Shutdown("done"))
    for rank in engine.ranks:
        rank.thread.join(DEADLINE_S)
        assert [m.step for m in rank.received[:-1] if isinstance(m, StepInput)] == list(range(5))
        assert rank.received[-1] == Shutdown("done")


def test_each_client_hears_of_its_own_requests_only_though_the_ids_are_the_same(make: Make) -> None:
    engine = make().start()
    one, other = engine.client(), engine.client()
    for request_id in range(6):
        one.add(request_id, prompt_len=3 + request_id, max_tokens=4, logprobs=2)
        other.add(request_id, prompt_len=30 + request_id, max_tokens=4, logprobs=2)
    for client, shortest in ((one, 3), (other, 30)):
        client.wait(lambda client=client: len(client.reasons) == 6)  # type: ignore[misc]
        for request_id in range(6):
            first = shortest + request_id
            assert client.tokens[request_id] == list(range(first, first + 4))
        for output in client.outputs:
            assert output.logprobs.tolist() == (-output.token_ids).tolist()
            assert output.top_token_ids.tolist() == np.repeat(output.token_ids, 2).tolist()


def test_requests_that_come_one_by_one_after_idle_times_all_wake_the_loop(make: Make) -> None:
    client = make(1).start().client()
    for request_id in range(20):
        client.add(request_id, max_tokens=2)
        client.wait(lambda request_id=request_id: request_id in client.reasons)  # type: ignore[misc]
        time.sleep(0.002 * (request_id % 3))


def test_an_idle_engine_uses_no_cpu(make: Make) -> None:
    engine = make(1).start()
    client = engine.client()
    client.add(1, max_tokens=2)
    client.wait(lambda: 1 in client.reasons)
    before_s = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before_s < 0.1


def test_an_invalid_request_is_answered_with_the_reason_and_harms_no_other(make: Make) -> None:
    client = make().start().client()
    client.add(1, max_tokens=3)
    client.add(2, prompt_len=200)
    client.add(3, prompt_len=0)
    client.add(4, max_tokens=3)
    client.wait(lambda: len(client.reasons) == 2 and len(client.failed) == 2)
    assert "max_model_len 200" in client.failed[2]
    assert "empty" in client.failed[3]
    assert client.tokens[1] == client.tokens[4] == [3, 4, 5]


def test_garbage_and_messages_that_no_client_sends_are_dropped(make: Make) -> None:
    client = make().start().client()
    client.lane.send([b""])
    client.lane.send([b"\x00" * 100])
    client.send(WorkerReady(0, 0, 1, 1, 1, 1.0))
    whole = b"".join(encode(AddRequest(1, np.array([5], np.int32), SamplingParams())))
    client.lane.send([whole[:-3]])
    client.add(9, max_tokens=2)
    client.wait(lambda: 9 in client.reasons)
    assert not client.failed


def test_an_aborted_request_gets_no_further_token_and_its_blocks_are_free_again(make: Make) -> None:
    engine = make().start()
    client = engine.client()
    client.add(1, max_tokens=150)
    client.wait(lambda: len(client.tokens[1]) > 2)
    client.send(AbortRequest(1))
    client.send(AbortRequest(99))
    client.send(Hello())
    client.wait(lambda: bool(client.ready))
    heard = len(client.tokens[1])
    assert heard < 150
    client.add(2, max_tokens=3)
    client.wait(lambda: 2 in client.reasons)
    assert len(client.tokens[1]) == heard
    assert 1 not in client.reasons
    assert engine.scheduler.num_free_blocks == NUM_BLOCKS


def test_the_requests_of_a_client_that_is_gone_are_aborted_and_those_of_others_go_on(make: Make) -> None:
    engine = make(1).start()
    engine.ranks[0].on_step = lambda rank, step: (time.sleep(0.002), rank.answer(step))[1]
    gone, staying = engine.client(), engine.client()
    gone.add(1, max_tokens=190)
    gone.add(2, max_tokens=190)
    gone.wait(lambda: bool(gone.tokens))
    gone.lane.close()
    staying.add(1, max_tokens=150)
    staying.wait(lambda: 1 in staying.reasons)
    assert len(staying.tokens[1]) == 150
    assert not engine.scheduler.has_unfinished


def test_shutdown_ends_workers_and_loop_and_tells_clients_what_was_left_unfinished(make: Make) -> None:
    engine = make().start()
    # So slow that nothing has ended before it is told to.
    engine.ranks[0].on_step = lambda rank, step: (time.sleep(0.02), rank.answer(step))[1]
    client, other = engine.client(), engine.client()
    client.add(1, max_tokens=190)
    other.add(1, max_tokens=190)
    client.wait(lambda: bool(client.tokens))
    other.wait(lambda: bool(other.tokens))
    client.send(Shutdown("enough"))
    client.wait(lambda: 1 in client.reasons)
    other.wait(lambda: 1 in other.reasons)
    assert client.reasons[1] == other.reasons[1] == FinishReason.ABORT
    engine.thread.join(DEADLINE_S)
    assert engine.error is None
    for rank in engine.ranks:
        rank.thread.join(DEADLINE_S)
        assert rank.received[-1] == Shutdown("enough")


def test_blocks_that_hold_less_than_max_model_len_limit_what_clients_are_told(make: Make) -> None:
    limits = SchedulerLimits(8, 64, 1000, 4, NUM_BLOCKS)
    client = make(1, limits).start().client()
    client.send(Hello())
    client.wait(lambda: bool(client.ready))
    assert client.ready[0].max_model_len == NUM_BLOCKS * 4 + 1
