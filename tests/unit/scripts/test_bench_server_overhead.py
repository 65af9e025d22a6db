"""The stand-in for the coordinator speaks its lane: each request gets its tokens, and then its end."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator

import pytest

from scripts.bench_server_overhead import cpu_s
from scripts.stand_in_coordinator import StandIn
from tprt.messages import SamplingParams
from tprt.server.engine_client import EngineClient
from tprt.transport.zmq_socket import RequestClient, RequestServer

WAIT_S = 20.0


@pytest.fixture
def client() -> Iterator[EngineClient]:
    with tempfile.TemporaryDirectory(prefix="tprt-test-") as folder:
        server = RequestServer.bind(f"ipc://{folder}/requests")
        thread = threading.Thread(target=StandIn(server, 5000, 500.0).run)
        thread.start()
        client = EngineClient(RequestClient.connect(server.address), None)
        try:
            yield client
        finally:
            client.shut_down("the test is over")
            client.close()
            thread.join(WAIT_S)
            server.close()
        assert not thread.is_alive()


def test_each_request_gets_its_tokens(client: EngineClient) -> None:
    client.hello()
    added = [
        client.add([1, 2], SamplingParams(max_tokens=max_tokens, ignore_eos=True)) for max_tokens in (1, 7, 30)
    ]
    ready, deadline_s = None, time.monotonic() + WAIT_S
    while client.num_running and time.monotonic() < deadline_s:
        ready = client.poll(0.1) or ready
    assert ready is not None
    completions = [completion for _, completion in added]
    assert [len(completion.token_ids) for completion in completions] == [1, 7, 30]
    assert [completion.finish_reason for completion in completions] == ["length"] * 3
    assert all(1000 <= token < 5000 for completion in completions for token in completion.token_ids)


def test_a_request_that_is_given_up_gets_no_more(client: EngineClient) -> None:
    request_id, completion = client.add([1], SamplingParams(max_tokens=10**6, ignore_eos=True))
    while not completion.token_ids:
        client.poll(0.1)
    client.abort(request_id)
    client.ask_for_stats()
    deadline_s = time.monotonic() + WAIT_S
    while client.stats is None and time.monotonic() < deadline_s:
        client.poll(0.1)
    assert client.stats is not None
    assert client.stats.num_running == 0


def test_cpu_time_is_that_of_the_process() -> None:
    before = sum(cpu_s(os.getpid()))
    times = os.times()
    assert before == pytest.approx(times.user + times.system, abs=0.1)
